"""One run of a scenario on a service: the client in its own process, the event, and everything that was observed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.servers.process import last_line, stop
from loadtests import samples
from loadtests.mix import span_s
from loadtests.samples import Sample
from loadtests.scenarios import SCENARIOS
from loadtests.target import Service
from loadtests.watch import EVERY_S, Moment, Watch

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
EVENT_PART = 1 / 3  # of the run, after which the event starts


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. A trace lasts until its last request, divided by `scale`."""

    scenario: str = "smoke"
    duration_s: float | None = None
    scale: float = 1.0
    seed: int = 0
    trace: Path | None = None

    @property
    def whole_s(self) -> float:
        if self.trace is not None:
            own_s = span_s(self.trace) / self.scale
            return max(1.0, own_s if self.duration_s is None else min(own_s, self.duration_s))
        return self.duration_s or SCENARIOS[self.scenario].duration_s


@dataclass(frozen=True, slots=True)
class Run:
    """`happened`: (start, end, description) of the scenario's event, in seconds of the run."""

    options: Options
    samples: list[Sample]
    moments: list[Moment]
    happened: list[tuple[float, float, str]]

    @property
    def duration_s(self) -> float:
        """The time in which requests are due; answers may arrive later."""
        return self.options.whole_s

    @property
    def offered_per_s(self) -> float:
        return len(self.samples) / self.duration_s


class ClientFailed(Exception):
    """The client ended without samples; the message is the last line of its output."""


def run(options: Options, service: Service, progress: Callable[[str], None] = lambda _: None) -> Run:
    """Run the scenario on the service. Raises ClientFailed."""
    with TemporaryDirectory(prefix="farsight-loadtest-") as folder:
        begun, found, log = (Path(folder) / name for name in ("begun", "samples.ndjson", "client.log"))
        with log.open("wb") as output:
            client = subprocess.Popen(
                _command(options, service, begun, found),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            progress("preparing")
            while not (begun.exists() and begun.read_text()) and client.poll() is None:
                time.sleep(0.05)
            if client.poll() is None:
                progress("running")
            moments, happened = _watched(options, service, client, begun)
        finally:
            stop(client)
        if not found.exists():
            raise ClientFailed(last_line(log))
        return Run(options, samples.read(found), moments, happened)


def _command(options: Options, service: Service, begun: Path, found: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", service.url, "--only-summary"]
    command += ["--grpc-port", f"{service.grpc_port}", "--scenario", options.scenario, "--seed", f"{options.seed}"]
    command += ["--duration", f"{options.whole_s}", "--scale", f"{options.scale}"]
    command += ["--started", str(begun), "--samples", str(found)]
    if options.trace is not None:
        command += ["--trace", str(options.trace)]
    return command


def _watched(
    options: Options, service: Service, client: subprocess.Popen[bytes], begun: Path
) -> tuple[list[Moment], list[tuple[float, float, str]]]:
    """Observe until the client ends: (moments, events)."""
    moments: list[Moment] = []
    happened: list[tuple[float, float, str]] = []
    if client.poll() is not None:
        return moments, happened
    start_s = float(begun.read_text())

    def trigger(event: Callable[[], str]) -> None:
        event_s = time.perf_counter() - start_s
        description = event()
        happened.append((event_s, time.perf_counter() - start_s, description))

    event: Future[None] | None = None
    watch = Watch(client.pid, service.leader, service.metrics_url)
    watch.look(start_s)  # the first moment has no cores, which are measured since the moment before
    with ThreadPoolExecutor(1) as pool:
        while client.poll() is None:
            time.sleep(EVERY_S)
            if service.event and not event and time.perf_counter() - start_s > EVENT_PART * options.whole_s:
                event = pool.submit(trigger, service.event)
            if client.poll() is None:
                moments.append(watch.look(start_s))
    if event:
        event.result()  # raises the error of the event
    return moments, happened
