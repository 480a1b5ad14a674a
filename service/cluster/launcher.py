"""Starts Ray, Serve and HAProxy on this machine, waits until they answer, and ends all of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from service.cluster.environment import reached_at
from service.commands.terminal import (
    console,
    fail,
)
from service.config import Config
from service.models.files import directory_of, task_of

APPLICATION = "farsight"


STOP_TIMEOUT_S = 15.0


HAPROXY_QUIET_S, HAPROXY_TIMEOUT_S = 1.5, 15.0  # without a reload: the service is ready


def _run(config: Config) -> None:
    # nothing has been started yet; an exception in the middle of an import may be lost, or change the exit status
    _on_signals(lambda *_: os._exit(0))
    started_s, answers = time.monotonic(), False
    console.print("starting Farsight ...")
    # imported here: Ray reads its environment at import
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from service.cluster.deployment import GRPC_SERVICERS, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    is_over = False

    def interrupt(*_: object) -> None:
        nonlocal is_over
        is_over = True  # where Ray loses the exception, the next step sees this
        raise KeyboardInterrupt

    def go_on() -> None:
        if is_over:
            raise KeyboardInterrupt

    try:
        _on_signals(interrupt)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, config.max_replicas or config.replicas),
            include_dashboard=False,
            runtime_env={"worker_process_setup_hook": "service.cluster.loopback.listen"},
            object_store_memory=128 * 1024 * 1024,  # tensors never pass through it
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
        _on_signals(interrupt)  # again: Ray has put a handler of its own on SIGTERM
        go_on()
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options=HTTPOptions(host=config.host, port=config.http_port),
                grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
                logging_config={"log_level": "WARNING"},
            )
            go_on()
            ray_serve.run(build(config), name=APPLICATION, route_prefix="/", blocking=False)
        except TimeoutError as error:
            fail(str(error))
        except RuntimeError as error:
            fail(_why() or str(error))
        answers = True
        _wait_for_haproxy(config)
        console.print(banner(config, time.monotonic() - started_s), soft_wrap=True)
        try:
            for name, reason in not_served(config).items():
                console.print(f"model {name!r} is not served: {reason}", style="red", soft_wrap=True)
        except OSError as error:  # no reason to end a service that runs
            console.print(f"the models' states could not be read: {error}", style="red", soft_wrap=True)
        go_on()
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("stopping ...")
    finally:
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        _stop(config, answers=answers)


def _why() -> str:
    """What a replica that does not start says last: the exception's line, without the lines that continue it."""
    from ray import serve as ray_serve

    applications = ray_serve.status().applications.values()
    messages = [each.message for one in applications for each in one.deployments.values()]
    lines = [line for message in messages for line in message.splitlines() if line[:1].strip()]
    return lines[-1] if lines else ""


def _wait_for_haproxy(config: Config) -> None:
    """HAProxy answers a moment before Serve gives it its last configuration, and its reload cuts what is on the way."""
    deadline_s = time.monotonic() + HAPROXY_TIMEOUT_S
    since_s, before = time.monotonic(), set[int]()
    while time.monotonic() < deadline_s:
        now = set(haproxy_pids(config.haproxy_dir))
        if now != before:
            since_s, before = time.monotonic(), now
        elif before and time.monotonic() - since_s > HAPROXY_QUIET_S:
            return
        time.sleep(0.1)


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Ctrl-C and SIGTERM end the service at any moment; a shell's background job starts with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stop(config: Config, *, answers: bool) -> None:
    """End everything that was started; a next start must find the ports free. `answers`: there may be requests."""
    import ray
    from ray import serve as ray_serve

    started, is_up = psutil.Process().children(recursive=True), ray.is_initialized()
    if is_up and answers:
        # what is in flight is answered first, within a minute, and has its log lines
        with suppress(Exception):  # whatever fails here, the rest must end
            ray_serve.delete(APPLICATION)
    # Ray reports its own actors' ends as errors here
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if is_up:
            with suppress(Exception):
                ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    # a Ray that was still starting knows nothing to end
    _, left = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S if is_up else 0)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for pid in haproxy_pids(config.haproxy_dir):  # one that was orphaned is nobody's child
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(config.haproxy_dir, ignore_errors=True)


def banner(config: Config, took_s: float) -> str:
    host, metrics_host = reached_at(config.host), reached_at(config.metrics_host)
    base = f"http://{host}:{config.http_port}"
    key = " -H 'authorization: Bearer KEY'" if config.tenants or config.tenants_file else ""
    lines = [
        f"Farsight is ready after {took_s:.1f} s",
        f"  HTTP     {base}  (docs: {base}/docs)",
        f"  gRPC     {host}:{config.grpc_port}",
        f"  metrics  http://{metrics_host}:{config.metrics_port}/metrics",
        "try:",
        f"  curl -s {base}/v1/attention{key} -H 'content-type: application/json' \\",
        '    -d \'{"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]}\'',
    ]
    name = next((one.name for one in config.models if (one.task or task_of(directory_of(one))) == "embed"), None)
    if name is not None:
        lines += [
            f"  curl -s {base}/v1/embeddings{key} -H 'content-type: application/json' \\",
            f'    -d \'{{"model": "{name}", "input": "How much does this cost?"}}\'',
        ]
    return "\n".join([*lines, "Ctrl-C stops it."])


def not_served(config: Config) -> dict[str, str]:
    """Models that could not be loaded, and why, as one replica tells it."""
    url = f"http://{reached_at(config.host)}:{config.http_port}/v2/repository/index"
    if config.tenants or config.tenants_file:  # who starts it has no key
        return {}
    # a proxy of the environment does not know this machine's loopback
    with build_opener(ProxyHandler({})).open(Request(url, method="POST"), timeout=10) as answer:
        rows = json.load(answer)
    return {row["name"]: row["reason"] for row in rows if row["state"] == "UNAVAILABLE"}


def haproxy_pids(directory: Path) -> Iterator[int]:
    """HAProxy processes of this service: those that run with its own configuration file."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        # the second word: a Python script that completes the configuration, and then becomes it
        is_haproxy = b"haproxy" in command[0] or any(part.endswith(b"farsight-haproxy") for part in command[1:2])
        if is_haproxy and any(part.startswith(os.fsencode(directory) + b"/") for part in command):
            yield int(entry.name)
