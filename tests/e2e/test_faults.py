"""What dies comes back at once, only the service's own processes may use Ray, and nothing outlives Ray's death."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.servers.process import session
from service.cluster.leftovers import MARK
from service.config import Config
from tests.e2e.conftest import Service, listens, start, stop
from tests.e2e.test_service import SMALL

pytestmark = pytest.mark.e2e
PORT = 27600
WITHIN_S = 5.0

INTRUDER = """
import os, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote(), timeout=30))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = start(tmp_path_factory.mktemp("faults"), PORT)
    yield running
    stop(running)


def process(service: Service, part: str) -> psutil.Process:
    (found,) = [one for one in session(service.process.pid) if part in " ".join(one.cmdline())]
    return found


def seconds_until_answered(service: Service) -> float:
    begun_s = time.monotonic()
    while time.monotonic() < begun_s + 60:
        try:
            if httpx.post(f"{service.url}/v1/attention", json=SMALL).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.02)
    return time.monotonic() - begun_s


def test_haproxy_is_back_at_once(own: Service) -> None:
    manager = process(own, "HAProxyManager")
    (haproxy,) = manager.children()
    haproxy.kill()
    assert not psutil.wait_procs([haproxy], timeout=WITHIN_S)[1]
    assert seconds_until_answered(own) < WITHIN_S
    assert manager.is_running(), "Ray has not replaced it"


def test_haproxy_goes_on_without_its_manager_and_the_next_one_takes_over(own: Service) -> None:
    manager = process(own, "HAProxyManager")
    (haproxy,) = manager.children()
    manager.kill()
    deadline_s = time.monotonic() + 60
    while haproxy.is_running() and haproxy.status() != psutil.STATUS_ZOMBIE:
        assert seconds_until_answered(own) < WITHIN_S
        assert time.monotonic() < deadline_s, "no other HAProxy took over"
    assert process(own, "HAProxyManager").pid != manager.pid
    assert seconds_until_answered(own) < WITHIN_S


def test_code_runs_only_with_the_token(own: Service, tmp_path: Path) -> None:
    token = Config(http_port=PORT).haproxy_dir / "ray-token"
    assert token.stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").write_text("0" * 64)
    (port,) = [
        one.laddr.port for one in process(own, "gcs_server").net_connections("tcp") if one.status == psutil.CONN_LISTEN
    ]

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        return subprocess.run(
            [sys.executable, "-c", INTRUDER, f"127.0.0.1:{port}"],
            env={**os.environ, **names, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    with_token = run(token)
    assert with_token.stdout.strip().isdigit(), with_token.stderr[-2000:]
    other = run(tmp_path / "other")
    assert other.returncode != 0
    assert not other.stdout
    assert "nauthenticated" in other.stderr or "InvalidAuthToken" in other.stderr, other.stderr[-2000:]


def test_nothing_outlives_the_gcs_and_the_next_start_works(own: Service) -> None:
    mark = process(own, "ServeController").environ()[MARK]
    ours = [one for one in psutil.process_iter() if readable(one).get(MARK) == mark]
    assert len(ours) > 8
    descriptors = [os.pidfd_open(one.pid) for one in ours]
    process(own, "gcs_server").kill()
    assert own.process.wait(WITHIN_S) == 1
    assert len(select.select(descriptors, [], [], 0)[0]) == len(ours)
    assert not [number for number in range(PORT, PORT + 300) if listens(number)]
    assert "farsight: Ray's gcs_server ended with -9" in own.log.read_text()
    again = start(own.log.parent, PORT)
    try:
        assert seconds_until_answered(again) < WITHIN_S
    finally:
        assert stop(again) == 0


def readable(one: psutil.Process) -> dict[str, str]:
    try:
        return one.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}
