"""A HAProxy that outlives its manager is replaced by the next one without a refused connection."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.cluster.environment import SCRIPTS
from service.cluster.leftovers import MARK
from tests.cluster.test_haproxy import CONFIG


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Takeover:
    """HAProxies that use one configuration file after another, without and with routes."""

    def __init__(self, directory: Path) -> None:
        self.path, self.port, self.admin = directory / "haproxy.cfg", free_port(), directory / "admin.sock"
        text = CONFIG.format(socket=self.admin).replace("level admin", "level admin expose-fd listeners")
        for before, after in (
            ("127.0.0.1:8000", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:9000", f"unix@{directory}/grpc.sock"),
            (":9101", f":{free_port()}"),
            ("bind *:8404", f"bind *:{free_port()}"),
        ):
            text = text.replace(before, after)
        body = "\n    use_backend a if TRUE\n    default_backend a\nfrontend grpc"
        self.text, routes = text, text.replace("\n    default_backend a\nfrontend grpc", body)
        served = "\nbackend a\n    http-request return status 200 content-type text/plain string served\n"
        self.routes = routes.replace("\nbackend a\n", served)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, config: str, *more: str) -> subprocess.Popen[bytes]:
        self.path.write_text(config)
        environment = {**os.environ, MARK: "1-1-test"}
        command = [SCRIPTS / "farsight-haproxy", "-db", "-f", self.path, *more]
        self.started.append(subprocess.Popen(command, env=environment))
        return self.started[-1]

    def start_first(self) -> subprocess.Popen[bytes]:
        first = self.start(self.routes)
        while not self.admin.exists() and first.poll() is None:
            time.sleep(0.01)
        assert self.get() == "served"
        return first

    def get(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/").text


@pytest.fixture
def takeover(tmp_path: Path) -> Iterator[Takeover]:
    made = Takeover(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def test_the_first_haproxy_of_a_new_manager_takes_over_from_the_one_that_was_left(takeover: Takeover) -> None:
    """With its routes, which Ray does not know yet, and without a moment in which a connection is refused."""
    left = takeover.start_first()
    assert os.getpgid(left.pid) == left.pid, "Ray kills the group of a manager that dies"
    new = takeover.start(takeover.text)
    while left.poll() is None:
        assert takeover.get() == "served", "at no moment 404 or refused"
    assert new.poll() is None
    assert takeover.get() == "served"
    new.kill()
    new.wait()
    alone = takeover.start(takeover.text)  # nothing is left: as Ray wants it
    while not (get_or_none(takeover.port)) and alone.poll() is None:
        time.sleep(0.01)
    assert takeover.get() != "served"
    assert [name.name for name in takeover.path.parent.glob("*.used-by-*")] == [f"haproxy.cfg.used-by-{alone.pid}"]


def test_a_reload_that_failed_leaves_the_haproxy_before_it_to_the_next_manager(takeover: Takeover) -> None:
    left = takeover.start_first()
    failed = takeover.start(takeover.routes + "\n    nonsense\n", "-sf", str(left.pid))
    assert failed.wait(20) != 0
    assert left.poll() is None
    new = takeover.start(takeover.text)
    assert left.wait(20) == 0
    assert new.poll() is None
    assert takeover.get() == "served", "with the configuration that was in use"


def test_an_admin_socket_without_a_process_is_not_asked(takeover: Takeover) -> None:
    """As after kill -9 of HAProxy, while the one before still answers its last request."""
    other = f"{takeover.admin}.other"
    before = takeover.start(takeover.routes.replace(str(takeover.admin), other))
    while not Path(other).exists() and before.poll() is None:
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(takeover.admin))
    new = takeover.start(takeover.text)
    assert before.wait(20) == 0
    assert new.poll() is None
    assert takeover.get() == "served"


def test_without_a_guard_haproxy_ends_with_its_manager(tmp_path: Path) -> None:
    """As on Kubernetes, where nothing else would end it: Ray kills the group of a manager that dies."""
    path = tmp_path / "haproxy.cfg"
    for mark in ({}, {MARK: "1-1-test"}):
        path.write_text(Takeover(tmp_path).routes)
        command = [SCRIPTS / "farsight-haproxy", "-db", "-f", path]
        environment = {name: value for name, value in os.environ.items() if name != MARK} | mark
        process = subprocess.Popen(command, env=environment)
        while not (tmp_path / "admin.sock").exists() and process.poll() is None:
            time.sleep(0.01)
        group = os.getpgid(process.pid)
        process.kill()
        process.wait()
        assert (group == process.pid) == bool(mark)
        (tmp_path / "admin.sock").unlink()


def get_or_none(port: int) -> int | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").status_code
    except httpx.TransportError:
        return None
