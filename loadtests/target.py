"""The service under load: started and stopped for the load test, or already running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.servers.lineup import Place, farsight_environment
from benchmarks.servers.process import Unavailable, last_line, ours, replicas, stop
from loadtests.nodes import HEAD
from loadtests.scenarios import Scenario
from service.config import Config
from service.models.demo import DEMO_MODEL

READY = b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
STOP_S = 120.0
LOCAL = "127.0.0.1"
ANSWER_S = 10.0  # timeout for a running service before it is loaded
DEFAULTS = {name: int(Config.model_fields[name].default) for name in ("http_port", "grpc_port", "metrics_port")}


@dataclass(frozen=True, slots=True)
class Service:
    """Its addresses, all on the host of `url`. Its processes are the session of `leader`, if it was started here."""

    url: str
    grpc_port: int
    metrics_port: int
    leader: int | None = None
    event: Callable[[], str] | None = None  # of the scenario; returns a description when it is done

    @property
    def metrics_url(self) -> str:
        return f"http://{urlsplit(self.url).hostname}:{self.metrics_port}/metrics"


def running(url: str, grpc_port: int | None, metrics_port: int | None) -> Service:
    """The service at `url`, after it has answered over HTTP and gRPC.

    Ports have defaults if the port of the URL is the default. Raises ValueError for wrong arguments, and Unavailable if
    the service does not answer.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url: expected for example http://127.0.0.1:8000, got {url!r}")
    if grpc_port is None or metrics_port is None:
        if parts.port != DEFAULTS["http_port"]:  # the default ports may be those of another service
            raise ValueError(f"--url {url} has another port than the default: give --grpc-port and --metrics-port too")
        grpc_port, metrics_port = grpc_port or DEFAULTS["grpc_port"], metrics_port or DEFAULTS["metrics_port"]
    service = Service(url.rstrip("/"), grpc_port, metrics_port)
    try:
        build_opener(ProxyHandler({})).open(f"{service.url}/readyz", timeout=ANSWER_S).close()
    except (OSError, HTTPException) as error:
        raise Unavailable(f"{service.url}/readyz: {error!r}") from error
    address = f"{parts.hostname}:{grpc_port}"
    with grpc.insecure_channel(address) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise Unavailable(f"gRPC at {address}: {error.code().name} {error.details()}") from error
    return service


@contextmanager
def started(scenario: Scenario, first_port: int) -> Iterator[Service]:
    """Run a service with the settings of the scenario during the block, on the 300 ports from `first_port`.

    Raises Unavailable if it does not start.
    """
    if scenario.event in ("update", "kill-node", "unplug-node"):
        with _deployed(scenario, first_port) as service:
            yield service
        return
    with ours(Path(), first_port, scenario.settings, READY) as (place, leader):
        event = (lambda: _kill_replica(leader)) if scenario.event == "kill" else None
        yield _service(place.port, leader, event)


@contextmanager
def _deployed(scenario: Scenario, first_port: int) -> Iterator[Service]:
    """Run a service deployed by a Serve configuration, as on a cluster, on one node or several.

    Its event is a second configuration, which replaces all replicas, or the loss of a node, which ends when there are
    as many replicas as before.
    """
    has_nodes, replicas = scenario.event != "update", int(scenario.settings["FARSIGHT_REPLICAS"])
    with TemporaryDirectory(prefix="farsight-loadtest-") as folder:
        place = Place(sys.executable, Path(), first_port, Path(folder))
        hosts = {"FARSIGHT_HOST": "0.0.0.0", "FARSIGHT_METRICS_HOST": "0.0.0.0"} if has_nodes else {}
        environment = {**os.environ, **farsight_environment(place), **hosts, **scenario.settings}
        log = Path(folder) / "deployer.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *(("loadtests.nodes", folder) if has_nodes else ("loadtests.deployer",))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

        def send(line: str) -> None:
            assert process.stdin is not None, "bug: opened without a pipe"
            assert process.stdout is not None, "bug: opened without a pipe"
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            if not any(line == b"done\n" for line in process.stdout):  # the deployer has ended
                raise Unavailable(f"not deployed: {last_line(log)}")

        def deploy(**changed: object) -> None:
            models = [DEMO_MODEL.model_dump(exclude_defaults=True)]
            arguments = {"replicas": replicas, "device": "cpu", "models": models, **changed}
            application = {"name": "farsight", "route_prefix": "/", "import_path": "service.cluster.deployment:build"}
            send(json.dumps({**application, "args": arguments}))

        def update() -> str:
            deploy(log_level="WARNING")
            return "all replicas replaced"

        def lose_node() -> str:
            send("kill" if scenario.event == "kill-node" else "unplug")
            start_s = time.monotonic()
            send(f"{-replicas}")
            detected_s = time.monotonic() - start_s
            send(f"{replicas}")
            event = "kill -9 of a node" if scenario.event == "kill-node" else "a node goes silent"
            restored_s = time.monotonic() - start_s
            return f"{event}; detected after {detected_s:.1f} s; {replicas} replicas after {restored_s:.1f} s"

        try:
            deploy()
            send(f"{replicas}")
            yield _service(first_port, process.pid, lose_node if has_nodes else update, HEAD if has_nodes else LOCAL)
            with suppress(subprocess.TimeoutExpired):  # the measurements are kept anyway, and `stop` ends it
                process.communicate(timeout=STOP_S)
        finally:
            stop(process)


def _kill_replica(leader: int) -> str:
    replicas(leader)[0].kill()
    return "kill -9 of a replica"


def _service(port: int, leader: int, event: Callable[[], str] | None, host: str = LOCAL) -> Service:
    return Service(f"http://{host}:{port}", port + 1, port + 2, leader, event)
