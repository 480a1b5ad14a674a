"""A service whose disk is full when it starts and again while it runs, and whose ledger is deleted under it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from tests.disks import Disk, mounted
from tests.e2e.conftest import Service, start, stop

pytestmark = pytest.mark.e2e

HEALED_S = 5.0
BODY = {"query": [[[1.0, 0.0]]], "key": [[[1.0, 0.0]]], "value": [[[1.0, 2.0]]]}


@dataclass
class Tried:
    service: Service
    disk: Disk
    client: httpx.Client
    answered: set[str] = field(default_factory=set)
    sent: int = 0

    @property
    def state(self) -> Path:
        return self.disk.root / "state"

    @property
    def ledger(self) -> Path:
        return self.state / f"ledger-{self.service.metrics_port}.sqlite"

    def ask(self) -> httpx.Response:
        self.sent += 1
        identity = f"request-{self.sent}"
        response = self.client.post("/v1/attention", json=BODY, headers={"x-request-id": identity})
        if response.status_code == 200:
            self.answered.add(identity)
        return response

    def is_refused(self) -> bool:
        """For want of room, by the service itself."""
        response = self.ask()
        if response.status_code == 200:
            return False
        if response.status_code == 503 and "error" in response.text:
            assert response.json()["error"]["message"] == "the ledger cannot be written"
            assert response.headers["retry-after"] == "5"
            return True
        return False  # HAProxy's own answer while there is no replica

    def recorded(self) -> set[str]:
        """Ids of answered requests in the ledger; none while it is being made."""
        query = "select request_id from requests where outcome = 'ok'"
        with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as database:
            if not database.execute("select name from sqlite_master where name = 'requests'").fetchall():
                return set()
            return {name for (name,) in database.execute(query)}

    def counted(self) -> float:
        """Answers by the metrics of the node."""
        lines = httpx.get(f"http://127.0.0.1:{self.service.metrics_port}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("farsight_requests_total{") and '"200"' in line]
        return sum(float(line.split()[-1]) for line in found)

    def replicas(self) -> list[psutil.Process]:
        family = psutil.Process(self.service.process.pid).children(recursive=True)
        return [process for process in family if "ray::ServeReplica" in " ".join(process.cmdline())]


def until(is_so: Callable[[], bool], limit_s: float) -> float:
    """The seconds that it took."""
    begin_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - begin_s < limit_s
        time.sleep(0.02)
    return time.monotonic() - begin_s


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    directory = tmp_path_factory.mktemp("full")
    with mounted(directory / "disk") as disk:
        disk.fill()
        settings = {"FARSIGHT_STATE_DIR": str(disk.root / "state"), "FARSIGHT_CACHE_DIR": str(disk.root / "cache")}
        service = start(directory, 28500, "--replicas", "1", **settings)
        with httpx.Client(base_url=service.url, timeout=60) as client:
            yield Tried(service, disk, client)
        assert stop(service) == 0


def test_a_service_that_started_on_a_full_disk_serves_once_it_has_room(tried: Tried) -> None:
    assert tried.is_refused()
    assert tried.client.get("/healthz").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{tried.service.metrics_port}/metrics").status_code == 200
    assert tried.client.get("/v1/usage").status_code == 503
    tried.disk.free()
    print("healed after", until(lambda: tried.ask().status_code == 200, HEALED_S))
    until(lambda: tried.client.get("/v1/usage").status_code == 200, HEALED_S)
    until(lambda: tried.recorded() == tried.answered, HEALED_S)


def test_a_disk_that_fills_up_kills_nothing_and_loses_nothing(tried: Tried) -> None:
    (replica,) = tried.replicas()
    tried.disk.fill()
    until(tried.is_refused, 60)
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < 5:  # several ticks
        assert tried.is_refused() or tried.ask().status_code == 200
        assert tried.client.get("/healthz").status_code == 200
    assert [process.pid for process in tried.replicas()] == [replica.pid]
    tried.disk.free()
    print("healed after", until(lambda: tried.ask().status_code == 200, HEALED_S))
    until(lambda: tried.recorded() == tried.answered, HEALED_S)
    until(lambda: tried.counted() == len(tried.answered), HEALED_S)


def test_a_replica_killed_on_a_full_disk_comes_back(tried: Tried) -> None:
    (replica,) = tried.replicas()
    tried.disk.fill()
    until(tried.is_refused, 60)
    replica.send_signal(signal.SIGKILL)
    replica.wait(30)
    until(lambda: bool(tried.replicas()) and tried.is_refused(), 90)
    tried.disk.free()
    print("healed after", until(lambda: tried.ask().status_code == 200, HEALED_S))
    until(lambda: tried.recorded() == tried.answered, 2 * HEALED_S)  # another's log is read every five seconds


def delete_ledger(tried: Tried) -> None:
    for path in tried.state.glob("ledger-*"):
        path.unlink()


def delete_state(tried: Tried) -> None:
    shutil.rmtree(tried.state)


@pytest.mark.parametrize("delete", [delete_ledger, delete_state])
def test_a_deleted_ledger_is_made_anew_and_later_requests_are_in_it(
    tried: Tried, delete: Callable[[Tried], None]
) -> None:
    until(lambda: tried.recorded() == tried.answered, HEALED_S)
    delete(tried)
    tried.answered.clear()  # they were in the deleted file
    assert tried.ask().status_code == 200
    print("made anew after", until(tried.ledger.exists, HEALED_S))
    until(lambda: tried.recorded() == tried.answered, HEALED_S)
    assert not any(path.stat().st_mode & 0o077 for path in tried.state.glob("ledger-*"))
    assert tried.client.get("/v1/usage").status_code == 200
    until(lambda: "was deleted or replaced" in tried.service.log.read_text(), HEALED_S)  # Ray forwards it
    metrics = f"http://127.0.0.1:{tried.service.metrics_port}/metrics"
    until(lambda: "farsight_ledger_errors_total" in httpx.get(metrics).text, HEALED_S)
