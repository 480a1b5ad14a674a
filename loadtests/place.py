"""The service under load: one that is started for it and ended after it, or one that runs already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtests.scenarios import Scenario
from service.bench.servers.lineup import Place, farsight_environment
from service.bench.servers.process import Unavailable, last_line, ours, replicas, stop
from service.cli import DEMO_MODEL

READY = b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
STOP_S = 120.0


@dataclass(frozen=True, slots=True)
class Service:
    """Where it listens; its processes are the session of `leader`, where it is ours."""

    url: str
    grpc_port: int
    metrics_port: int
    leader: int | None = None
    happen: Callable[[], str] | None = None  # the scenario's event; returns what was done, once it is


def running(url: str, grpc_port: int, metrics_port: int) -> Service:
    return Service(url.rstrip("/"), grpc_port, metrics_port)


@contextmanager
def started(scenario: Scenario, first_port: int) -> Iterator[Service]:
    """With the scenario's settings, on the 300 ports from `first_port`. Unavailable: it does not start."""
    if scenario.event == "update":
        with deployed(scenario.settings, first_port) as service:
            yield service
        return
    with ours(Path(), first_port, scenario.settings, READY) as (place, leader):
        happen = (lambda: kill_one(leader)) if scenario.event == "kill" else None
        yield _service(place.port, leader, happen)


@contextmanager
def deployed(settings: Mapping[str, str], first_port: int) -> Iterator[Service]:
    """By a Serve configuration, as on a cluster; its event is a second one, which replaces all replicas."""
    with TemporaryDirectory(prefix="farsight-loadtest-") as folder:
        place = Place(sys.executable, Path(), first_port, Path(folder))
        environment = {**os.environ, **farsight_environment(place), **settings}
        log = Path(folder) / "deployer.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "loadtests.deployer"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

        def deploy(**changed: object) -> str:
            assert process.stdin is not None, "bug: opened without a pipe"
            assert process.stdout is not None, "bug: opened without a pipe"
            models = [DEMO_MODEL.model_dump(exclude_defaults=True)]
            arguments = {"replicas": int(settings["FARSIGHT_REPLICAS"]), "device": "cpu", "models": models, **changed}
            application = {"name": "farsight", "route_prefix": "/", "import_path": "service.app:build"}
            process.stdin.write(json.dumps({**application, "args": arguments}).encode() + b"\n")
            process.stdin.flush()
            if not any(line == b"deployed\n" for line in process.stdout):  # it ended
                raise Unavailable(f"not deployed: {last_line(log)}")
            return "all replicas replaced"

        try:
            deploy()
            yield _service(first_port, process.pid, lambda: deploy(log_level="WARNING"))
            process.communicate(timeout=STOP_S)
        finally:
            stop(process)


def kill_one(leader: int) -> str:
    replicas(leader)[0].kill()
    return "kill -9 of a replica"


def _service(port: int, leader: int, happen: Callable[[], str] | None) -> Service:
    return Service(f"http://127.0.0.1:{port}", port + 1, port + 2, leader, happen)
