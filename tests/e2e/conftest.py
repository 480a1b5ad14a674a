"""One real service for all end-to-end tests: Ray Serve, HAProxy, two replicas, on ports of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.cluster.environment import SCRIPTS

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Service:
    """Where a running service listens."""

    process: subprocess.Popen[bytes]
    log: Path
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


def environment(directory: Path, base: int) -> dict[str, str]:
    """Ports from `base`, below the kernel's ephemeral range and away from Ray's own and a developer's service."""
    return {
        **os.environ,
        "FARSIGHT_HTTP_PORT": str(base),
        "FARSIGHT_GRPC_PORT": str(base + 1),
        "FARSIGHT_METRICS_PORT": str(base + 2),
        "FARSIGHT_HAPROXY_METRICS_PORT": str(base + 3),
        "FARSIGHT_HAPROXY_STATS_PORT": str(base + 4),
        "FARSIGHT_REPLICA_PORT_BASE": str(base + 100),
        "FARSIGHT_STATE_DIR": str(directory),
    }


def start(directory: Path, base: int, *arguments: str, **settings: str) -> Service:
    """`directory`: of its state and its log. settings: environment variables."""
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SCRIPTS / "farsight", "serve", *arguments],
            env=environment(directory, base) | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as a shell does: Ctrl-C reaches the whole group
        )
    service = Service(process, log, base, base + 1, base + 2)
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Farsight is ready" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(service)
            pytest.fail(f"the service did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)
    return service


def stop(service: Service) -> int:
    """Ctrl-C; the exit code."""
    if service.process.poll() is None:
        os.killpg(service.process.pid, signal.SIGINT)
    try:
        return service.process.wait(90)
    except subprocess.TimeoutExpired:
        os.killpg(service.process.pid, signal.SIGKILL)
        raise


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = start(tmp_path_factory.mktemp("farsight"), 27000, "--demo", "--replicas", "2")
    yield running
    assert stop(running) == 0
    left = [number for number in range(27000, 27300) if listens(number)]
    assert not left, f"Ctrl-C left listeners on {left}"


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client
