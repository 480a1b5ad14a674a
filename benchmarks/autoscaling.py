"""Two replicas under load, one after it, and no failed request during either change.

One client sends requests all the time; for a while other clients add more work than one replica can do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from benchmarks.client import Connection, exchanged
from benchmarks.overload import HOST, requests
from benchmarks.servers.lineup import REPLICA_PORTS
from benchmarks.servers.process import is_taken, ours, replicas

SAMPLE_S = 0.5
TIMEOUT_S = 120.0  # for a replica to be added or removed
EXTRA_CLIENTS = 12
PAUSE_S = 0.5  # between the requests of the permanent client
QUEUE_METRIC = b"farsight_queue_predicted_seconds "


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    both_s: float = 20.0  # seconds of load on two replicas
    upscale_delay_s: float = 2.0
    downscale_delay_s: float = 5.0
    first_port: int = 22500


@dataclass(frozen=True, slots=True)
class Moment:
    """The state at `at_s`, seconds after the load began."""

    at_s: float
    replicas: int  # processes, including one that still loads its models
    answering: int
    queue_s: float  # predicted device seconds that wait in all replicas
    worked_s: list[float]  # processor seconds so far by replica, oldest first
    answered: int


@dataclass(slots=True)
class Figures:
    """Seconds after the load began (`came_s`) or ended (`went_s`), rates, and the number of answers by status."""

    came_s: float = 0.0
    went_s: float = 0.0
    alone_per_s: float = 0.0
    both_per_s: float = 0.0
    worked_s: float = 0.0  # processor seconds of the second replica under load
    statuses: dict[str, int] = field(default_factory=dict)
    timeline: list[Moment] = field(default_factory=list)


def run(settings: Settings, model: Path, step: Callable[[str], None]) -> Figures:
    """Start a service and measure it. Raises RuntimeError if a replica is not added or not removed."""
    environment = {
        "FARSIGHT_REPLICAS": "1",
        "FARSIGHT_MAX_REPLICAS": "2",
        "FARSIGHT_UPSCALE_DELAY_S": f"{settings.upscale_delay_s}",
        "FARSIGHT_DOWNSCALE_DELAY_S": f"{settings.downscale_delay_s}",
    }
    pool = requests(settings.first_port)
    step("starting")
    with ours(model, settings.first_port, environment, pool[0]) as (place, leader):
        return uvloop.run(_Run(settings, place.port, leader, pool, step).measure())


class _Run:
    """Generates the load and observes its effect."""

    def __init__(
        self, settings: Settings, port: int, leader: int, pool: list[bytes], step: Callable[[str], None]
    ) -> None:
        self._settings, self._port, self._leader, self._pool, self._step = settings, port, leader, pool, step
        self._found = Figures()
        self._start_s = time.perf_counter()

    async def measure(self) -> Figures:
        found = self._found
        stop, stop_extra = asyncio.Event(), asyncio.Event()
        clients = [asyncio.create_task(self._client(stop, PAUSE_S))]
        clients += [asyncio.create_task(self._client(stop_extra, 0.0)) for _ in range(EXTRA_CLIENTS)]
        self._step("load for two")
        last = await self._until(lambda now: now.answering == 2)
        found.came_s = last.at_s
        found.alone_per_s = last.answered / last.at_s
        self._step("two replicas")
        while (now := await self._look()).at_s < found.came_s + self._settings.both_s:
            pass
        found.both_per_s = (now.answered - last.answered) / (now.at_s - last.at_s)
        found.worked_s = now.worked_s[-1] - last.worked_s[-1]
        stop_extra.set()
        self._step("load for one")
        found.went_s = (await self._until(lambda now: now.replicas == 1)).at_s - now.at_s
        for _ in range(4):  # the remaining replica keeps answering
            await self._look()
        stop.set()
        await asyncio.gather(*clients)
        return found

    async def _client(self, stop: asyncio.Event, pause_s: float) -> None:
        """Send requests one after another on one connection until `stop` is set."""
        connection = await Connection.open(HOST, self._port)
        number = 0
        while not stop.is_set():
            if not connection.is_open:  # HAProxy closes it when its replicas change
                connection = await Connection.open(HOST, self._port)
            try:
                status, _ = await connection.send(self._pool[number % len(self._pool)])
                outcome = str(status)
            except ConnectionError as error:
                outcome = repr(error)
            self._found.statuses[outcome] = self._found.statuses.get(outcome, 0) + 1
            number += 1
            await asyncio.sleep(pause_s)
        connection.close()

    async def _until(self, condition: Callable[[Moment], bool]) -> Moment:
        deadline_s = time.perf_counter() + TIMEOUT_S
        while not condition(now := await self._look()):
            if time.perf_counter() > deadline_s:
                raise RuntimeError(f"still {now.replicas} replicas after {TIMEOUT_S:g} s")
        return now

    async def _look(self) -> Moment:
        """Append the current state to the timeline."""
        await asyncio.sleep(SAMPLE_S)
        worked_s = []
        for process in sorted(replicas(self._leader), key=psutil.Process.create_time):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                worked_s.append(times.user + times.system)
        at_s, answered = time.perf_counter() - self._start_s, self._found.statuses.get("200", 0)
        first = self._port + REPLICA_PORTS + 1  # the port before belongs to Serve's own fallback proxy
        answering = sum(is_taken(port) for port in range(first, first + 4))
        now = Moment(at_s, len(worked_s), answering, await self._queue_s(), worked_s, answered)
        self._found.timeline.append(now)
        return now

    async def _queue_s(self) -> float:
        """Predicted device seconds in the queue, from the metrics of the node."""
        request = f"GET /metrics HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode()
        text = (await exchanged(HOST, self._port + 2, [request], 1)).bodies[0]
        lines = [line for line in text.splitlines() if line.startswith(QUEUE_METRIC)]
        return float(lines[0].rsplit(b" ", 1)[1]) if lines else 0.0
