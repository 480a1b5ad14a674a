"""Start Ray, Serve and HAProxy on this machine, keep them running until a signal, and stop all of them."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from service.cluster.guard import Guard
from service.config import Config
from service.scheduling.scheduler import Order

APPLICATION = "farsight"
STOP_TIMEOUT_S = 15.0  # for the processes of Ray; after that the guard kills them
HAPROXY_TIMEOUT_S = 15.0
WATCH_S = 0.5
NEEDED = ("gcs_server", "raylet")
HAPROXY_SETTLED_S = 1.5  # HAProxy has its last configuration after this long without a reload

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


class RayDied(Exception):
    """A process that Ray needs has ended; the message is one line."""


class StartFailed(Exception):
    """The service did not start; the message is one line that says why."""


def run(
    config: Config,
    guard: Guard,
    order: Order = "fair",
    *,
    report: Callable[[str], None],
    on_ready: Callable[[float], None],
) -> None:
    """Run the service until Ctrl-C or SIGTERM, then answer what is in flight and stop everything that was started.

    Args:
        config: settings; `environment.ray_environment` must already be in `os.environ`.
        guard: of this process; its environment must be in `os.environ`, too.
        order: of the queue; see `Engine`.
        report: receives a line when the service starts to start and when it stops.
        on_ready: called once with the seconds that the start took, when requests are answered.

    Raises:
        StartFailed, RayDied: Serve or a replica did not start; Ray ended later, and nothing is left.
    """
    # only the guard has started; an exception in the middle of an import may get lost or change the exit status
    _handle_signals(lambda *_: os._exit(0))
    started_s, is_answering, has_died = time.monotonic(), False, False
    report("starting Farsight ...")
    import service.cluster.deployment  # noqa: F401 (imports Ray, which reads its environment at import)

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    interrupt = _Interrupt()
    try:
        interrupt.install()
        _start_ray(config)
        interrupt.install()  # again: Ray installs a SIGTERM handler of its own
        interrupt.check()
        _deploy(config, order, interrupt)
        is_answering = True
        _await_haproxy(config.haproxy_dir)
        on_ready(time.monotonic() - started_s)
        interrupt.check()
        _watch(guard)
    except KeyboardInterrupt:
        report("stopping ...")
    except RayDied:
        has_died = True
        raise
    finally:
        _handle_signals(signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        if not has_died:  # otherwise Ray would wait for a minute
            _stop(guard, drain=is_answering)
        guard.end()
        shutil.rmtree(config.haproxy_dir, ignore_errors=True)


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into KeyboardInterrupt."""

    def __init__(self) -> None:
        self._is_raised = False

    def install(self) -> None:
        _handle_signals(self._raise)

    def check(self) -> None:
        """Raise KeyboardInterrupt again if Ray has lost it."""
        if self._is_raised:
            raise KeyboardInterrupt

    def _raise(self, *_: object) -> None:
        self._is_raised = True
        raise KeyboardInterrupt


def _handle_signals(handler: Handler) -> None:
    """Handle Ctrl-C and SIGTERM, also in a shell's background job, which starts with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _start_ray(config: Config) -> None:
    import ray

    from service.cluster import worker

    # Ray's processes import from the directory that this runs in first: another `service` there would be run
    os.environ[worker.DIRECTORY] = os.getcwd()
    with chdir(config.haproxy_dir):
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, config.max_replicas or config.replicas),
            include_dashboard=False,
            # all users may write into Ray's directories, but not reach these
            _temp_dir=str(config.haproxy_dir / "ray"),
            runtime_env={"worker_process_setup_hook": "service.cluster.worker.prepare"},
            object_store_memory=128 * 1024 * 1024,  # tensors never pass through it
            log_to_driver=True,
            logging_level=logging.WARNING,
        )


def _deploy(config: Config, order: Order, interrupt: _Interrupt) -> None:
    """Start Serve with HAProxy and wait for the replicas. Raises StartFailed."""
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from service.cluster.deployment import GRPC_SERVICERS, application

    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=config.host, port=config.http_port),
            grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
            logging_config={"log_level": "WARNING"},
        )
        interrupt.check()
        serve.run(application(config, order), name=APPLICATION, route_prefix="/", blocking=False)
    except TimeoutError as error:
        raise StartFailed(str(error)) from error
    except RuntimeError as error:
        raise StartFailed(_last_error() or str(error)) from error


def _last_error() -> str:
    """The last error of a replica that did not start: the exception's line, without the lines that continue it."""
    from ray import serve

    messages = [
        deployment.message
        for application in serve.status().applications.values()
        for deployment in application.deployments.values()
    ]
    lines = [line for message in messages for line in message.splitlines() if line[:1].strip()]
    return lines[-1] if lines else ""


def _await_haproxy(directory: Path) -> None:
    """Wait until HAProxy no longer reloads. It answers before Serve writes its last configuration, and that reload
    closes connections."""
    deadline_s = time.monotonic() + HAPROXY_TIMEOUT_S
    changed_s, pids = time.monotonic(), set[int]()
    while time.monotonic() < deadline_s:
        now = set(_haproxy_pids(directory))
        if now != pids:
            changed_s, pids = time.monotonic(), now
        elif pids and time.monotonic() - changed_s > HAPROXY_SETTLED_S:
            return
        time.sleep(0.1)


def _watch(guard: Guard) -> None:
    """Watch guard and Ray until a signal. Raises RayDied: nothing would replace replicas, and Ray ends us later."""
    from ray._private import worker

    node: Any = worker._global_node  # typed as None
    while True:
        guard.check()
        for name, process in node.dead_processes():
            if name in NEEDED:
                raise RayDied(f"Ray's {name} ended with {process.returncode}; everything is stopped")
        time.sleep(WATCH_S)


def _stop(guard: Guard, *, drain: bool) -> None:
    """End what was started, in order; the guard kills what is left.

    `drain`: answer the requests in flight first, for at most a minute, and write their log lines.
    """
    import ray
    from ray import serve

    children, is_initialized = psutil.Process().children(recursive=True), ray.is_initialized()
    if is_initialized and drain:
        with suppress(Exception):  # whatever fails here, everything else must still be stopped
            serve.delete(APPLICATION)
    # Ray reports the end of its own actors as errors
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        if is_initialized:
            with suppress(Exception):
                serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    if is_initialized:  # a Ray that was still starting does not know its processes yet
        psutil.wait_procs([child for child in children if child.pid != guard.pid], timeout=STOP_TIMEOUT_S)


def _haproxy_pids(directory: Path) -> Iterator[int]:
    """HAProxy processes of this service: those whose configuration file is in `directory`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # the process has ended
        # the second word: farsight-haproxy is a Python script that completes the configuration, then becomes HAProxy
        is_haproxy = b"haproxy" in command[0] or any(part.endswith(b"farsight-haproxy") for part in command[1:2])
        if is_haproxy and any(part.startswith(os.fsencode(directory) + b"/") for part in command):
            yield int(entry.name)
