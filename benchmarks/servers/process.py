"""The venv and the process of a server: install it once, start it, wait until it answers, and always stop it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil
import uvloop

from benchmarks.client import exchanged
from benchmarks.servers.lineup import LINEUP, TORCH, Contender, Place

START_TIMEOUT_S = 180.0
TRY_TIMEOUT_S = 60.0  # for the first answer
STOP_TIMEOUT_S = 30.0

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class Unavailable(Exception):
    """A server that cannot be measured; the message says why."""


def install(contender: Contender, cache: Path) -> str:
    """Path of the Python in the server's venv, created on first use and after a change of requirements. Unavailable."""
    if not contender.requirements:
        return sys.executable
    folder = cache / contender.name
    python = str(folder / "bin" / "python")
    stamp, wanted = folder / "requirements.txt", "\n".join(contender.requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    try:
        build(folder, python, contender.requirements)
        stamp.write_text(wanted)
    except OSError as error:
        raise Unavailable(f"not installed: {error}") from error
    return python


def build(folder: Path, python: str, requirements: Sequence[str]) -> None:
    """Create the venv. torch is installed first and alone, so that later packages keep its build. Unavailable."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [python, "-m", "pip", "install"]
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # otherwise its notice would be the last line
    with (folder / "install.log").open("wb") as log:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, TORCH], [*pip, *requirements]):
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=quiet, check=False)
            if ended.returncode:
                raise Unavailable(f"not installed: {last_line(folder / 'install.log')}")


def versions(contender: Contender, python: str) -> dict[str, str]:
    """Versions of the packages that the server is made of, in the environment of `python`."""
    if contender.requirements:
        names = [re.split(r"[\[=]", requirement)[0] for requirement in contender.requirements]
        paths = [str(path) for path in Path(python).parent.parent.glob("lib/python3*/site-packages")]
    else:
        names, paths = ["farsight", "ray", "transformers", "torch"], sys.path
    found = {package.name.replace("_", "-").lower(): package.version for package in distributions(path=paths)}
    return {name: found[name] for name in names if name in found}


@contextmanager
def running(contender: Contender, place: Place, request: bytes) -> Iterator[int]:
    """Run the server during the block, which begins when `request` is answered with 200; yields its process id.

    Raises Unavailable if it does not start.
    """
    if is_taken(place.port):  # otherwise another server would be measured
        raise Unavailable(f"port {place.port} is already in use")
    place.scratch.mkdir()
    log = place.scratch / "server.log"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                contender.command(place),
                env={**os.environ, **contender.environment(place)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only us, and its processes can be found
            )
        except OSError as error:
            raise Unavailable(f"not started: {error}") from error
    try:
        await_answer(process, contender, place.port, request, log)
        yield process.pid
    finally:
        stop(process)


@contextmanager
def ours(
    model: Path, first_port: int, settings: Mapping[str, str], request: bytes, farsight: Contender = LINEUP[0]
) -> Iterator[tuple[Place, int]]:
    """Run Farsight with additional FARSIGHT_* `settings` during the block; yields (place, process id)."""
    contender = replace(farsight, environment=lambda place: {**farsight.environment(place), **settings})
    with TemporaryDirectory(prefix="farsight-bench-") as folder:
        place = Place(sys.executable, model, first_port, Path(folder) / "server")
        with running(contender, place, request) as leader:
            yield place, leader


def replicas(leader: int) -> list[psutil.Process]:
    """Replica processes of the Farsight whose process id is `leader`."""
    found = []
    for process in session(leader):
        with suppress(psutil.NoSuchProcess):
            if any("ServeReplica" in part for part in process.cmdline()):
                found.append(process)
    return found


def await_answer(process: subprocess.Popen[bytes], contender: Contender, port: int, request: bytes, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise Unavailable(f"ended with {process.returncode}: {last_line(log)}")
        try:
            if contender.ready in log.read_text(errors="replace"):
                uvloop.run(exchanged("127.0.0.1", port, [request], 1, TRY_TIMEOUT_S))
                return
            missing = f"it did not print {contender.ready!r}"
        except (OSError, RuntimeError, ValueError) as error:  # not listening yet, or not ready
            missing = str(error)
        if time.monotonic() > deadline_s:
            raise Unavailable(f"not ready in {START_TIMEOUT_S:.0f} s: {missing}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGINT, then kill the processes that remain in its session."""
    with handling(signal.SIG_IGN):  # a second Ctrl-C would leave servers behind
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        while left := session(process.pid):  # until they are gone: the next server uses their port
            for remaining in left:
                with suppress(psutil.NoSuchProcess):
                    remaining.kill()
            time.sleep(0.01)
        process.wait()


def session(leader: int) -> list[psutil.Process]:
    """Processes in the session that `leader` leads, including orphans."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handle Ctrl-C, SIGTERM and a closed terminal with `handler` during the block. Python's own handler raises
    KeyboardInterrupt; setting it explicitly matters in a background job, which starts with SIGINT ignored and passes
    that on to its children."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def last_line(log: Path) -> str:
    """The last line of a log, which is usually the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
