"""Observes machine and service during a run from a third process: cores, memory, queue and batches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from urllib.request import ProxyHandler, build_opener

import psutil

from benchmarks.servers.process import replicas, session

EVERY_S = 1.0
SCRAPE_S = 2.0  # timeout: a busy service answers late, and must not delay the next moment


@dataclass(frozen=True, slots=True)
class Moment:
    """Readings at `at_s` of the run. NaN if unknown: a remote service has no processes here."""

    at_s: float
    client_cores: float  # since the previous moment
    service_cores: float
    service_bytes: float  # resident memory of its replicas; of a remote service from the metrics of its node
    replicas: int
    queue_s: float  # predicted device seconds that wait
    batches: float  # counters
    batched_requests: float
    batched_tokens: float


class Watch:
    """Call `look` at least every few seconds: the time used by a process after the last call is lost when it ends."""

    def __init__(self, client: int, leader: int | None, metrics_url: str) -> None:
        self._client, self._leader, self._url = client, leader, metrics_url
        self._without_proxy = build_opener(ProxyHandler({}))  # a proxy of the environment cannot reach this machine
        self._last_s = time.perf_counter()
        self._client_s: dict[int, float] = {}
        self._service_s: dict[int, float] = {}

    def look(self, start_s: float) -> Moment:
        """The current moment. `start_s`: start of the run, by time.perf_counter."""
        now_s = time.perf_counter()
        since_s, self._last_s = now_s - self._last_s, now_s
        client, self._client_s = _worked([psutil.Process(self._client)], self._client_s)
        service, resident, count = nan, nan, 0
        if self._leader is not None:
            service, self._service_s = _worked(session(self._leader), self._service_s)
            own = replicas(self._leader)
            resident, count = _resident(own), len(own)
        seen = counters(self._scraped())  # last, because it may be slow
        if self._leader is None:
            resident = seen.get("farsight_resident_memory_bytes", nan)
        return Moment(
            at_s=now_s - start_s,
            client_cores=client / since_s,
            service_cores=service / since_s,
            service_bytes=resident,
            replicas=count,
            queue_s=seen.get("farsight_queue_predicted_seconds", nan),
            batches=seen.get("farsight_batch_requests_count", nan),
            batched_requests=seen.get("farsight_batch_requests_sum", nan),
            batched_tokens=seen.get("farsight_batch_tokens_sum", nan),
        )

    def _scraped(self) -> str:
        with suppress(OSError), self._without_proxy.open(self._url, timeout=SCRAPE_S) as answer:
            return str(answer.read(), "utf-8")
        return ""


def counters(text: str) -> dict[str, float]:
    """Values of the series without labels in Prometheus text."""
    lines = (line.split(" ") for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value, *_ in lines}


def _worked(processes: Iterable[psutil.Process], before: dict[int, float]) -> tuple[float, dict[int, float]]:
    """(processor seconds since `before`, the next `before`); `before` has the processor seconds by process id."""
    now: dict[int, float] = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            now[process.pid] = times.user + times.system
    return sum(seconds - before.get(pid, seconds) for pid, seconds in now.items()), now


def _resident(processes: Iterable[psutil.Process]) -> float:
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return float(total)
