"""Attention at capacity and at twice the capacity, open loop: goodput, refusals, and the accuracy of Retry-After.

Ten times per second an estimate, which runs nothing, checks whether a request would be admitted. A refused estimate
reports the seconds to wait; they are compared with the time until an estimate is admitted again.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import uvloop

from benchmarks.client import Connection, Sample, drive, open_loop, poisson, post
from benchmarks.servers.process import ours, replicas

HOST = "127.0.0.1"
LENGTHS = (512, 768, 1024, 1536)  # tokens, 8 heads of 64
MAX_QUEUE_S = 10.0
POLL_S = 0.1
SETTLE_S = 15.0  # between the last answer and the last reading of the memory


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    duration_s: float = 40.0
    factor: float = 2.0
    first_port: int = 22100


@dataclass(slots=True)
class Figures:
    """Results of one run; memory in bytes."""

    capacity_per_s: float
    at_capacity_per_s: float = 0.0  # answers within the run
    at_overload_per_s: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    retry_reported_s: list[float] = field(default_factory=list)
    retry_actual_s: list[float] = field(default_factory=list)
    memory_before: int = 0
    memory_peak: int = 0
    memory_after: int = 0

    @property
    def right(self) -> float:
        """Share of the refusals whose Retry-After was within a factor of two of the actual time."""
        pairs = list(zip(self.retry_reported_s, self.retry_actual_s, strict=True))
        right = sum(0.5 <= reported / max(actual, 1e-9) <= 2.0 for reported, actual in pairs)
        return right / len(pairs) if pairs else 1.0


def run(settings: Settings, model: Path) -> Figures:
    pool = requests(settings.first_port)
    with ours(model, settings.first_port, {"FARSIGHT_MAX_QUEUE_S": f"{MAX_QUEUE_S}"}, pool[0]) as (place, leader):
        return measure(settings, place.port, pool, replicas(leader)[0])


def measure(settings: Settings, port: int, pool: list[bytes], replica: psutil.Process) -> Figures:
    draw = random.Random(1)
    uvloop.run(drive(HOST, port, pool * 2, 4))  # warms up
    took_s, _ = uvloop.run(drive(HOST, port, draw.choices(pool, k=100), 8))
    figures = Figures(100 / took_s)
    figures.memory_before = memory(replica)
    for factor in (1.0, settings.factor):
        at_s = poisson(factor * figures.capacity_per_s, settings.duration_s, seed=int(10 * factor))
        sent = list(zip(at_s, draw.choices(pool, k=len(at_s)), strict=True))
        watch = factor > 1
        run = watched(port, sent, settings.duration_s if watch else 0.0, replica)
        samples, retries, figures.memory_peak = uvloop.run(run)
        within = sum(
            sample.status == 200 and sample.at_s + sample.latency_s <= settings.duration_s for sample in samples
        )
        if not watch:
            figures.at_capacity_per_s = within / settings.duration_s
            continue
        figures.at_overload_per_s = within / settings.duration_s
        figures.statuses = {
            str(code): count for code, count in sorted(Counter(sample.status for sample in samples).items())
        }
        figures.retry_reported_s = [reported_s for reported_s, _ in retries]
        figures.retry_actual_s = [actual_s for _, actual_s in retries]
    time.sleep(SETTLE_S)
    figures.memory_after = memory(replica)
    return figures


async def watched(
    port: int, sent: list[tuple[float, bytes]], watch_s: float, replica: psutil.Process
) -> tuple[list[Sample], list[tuple[float, float]], int]:
    """(samples of the run, (reported, actual) seconds of refusals seen by an observer, peak memory in bytes)."""
    load = asyncio.create_task(open_loop(HOST, port, sent))
    peak = asyncio.create_task(peak_memory(replica, load))
    retries = await observe(port, watch_s) if watch_s else []
    return await load, retries, await peak


async def peak_memory(replica: psutil.Process, until: asyncio.Task[list[Sample]]) -> int:
    peak = 0
    while not until.done():
        peak = max(peak, memory(replica))
        await asyncio.sleep(POLL_S)
    return peak


async def observe(port: int, duration_s: float) -> list[tuple[float, float]]:
    """(reported, actual) seconds to wait of each refused estimate, known once an estimate is admitted again."""
    connection = await Connection.open(HOST, port)
    found: list[tuple[float, float]] = []
    start_s = time.perf_counter()
    refused: list[tuple[float, float]] = []  # (time, reported seconds) since the queue was last open
    body = {"attention": {"heads": 8, "query_length": LENGTHS[-1], "head_dim": 64}}
    query = post(HOST, port, "/v1/estimate", orjson.dumps(body))
    while (now_s := time.perf_counter() - start_s) < duration_s:
        _, answer = await connection.send(query)
        estimate: dict[str, Any] = orjson.loads(answer)
        if estimate["would_admit"]:
            found += [(reported_s, now_s - at_s) for at_s, reported_s in refused]
            refused = []
        elif "retry_after_s" in estimate:
            refused.append((now_s, estimate["retry_after_s"]))
        await asyncio.sleep(POLL_S)
    connection.close()
    return found


def requests(port: int) -> list[bytes]:
    """Safetensors requests, encoded before the run."""
    from safetensors.torch import save

    from service.attention.synthetic import InputShape, structured

    found = []
    for length in LENGTHS:
        query, key, value = structured(InputShape(1, 8, 8, length, 64))
        options = json.dumps({"mode": "chunked", "timeout_s": 60})
        body = save({"query": query, "key": key, "value": value}, metadata={"options": options})
        found.append(post(HOST, port, "/v1/attention", body, "application/x-safetensors"))
    return found


def memory(replica: psutil.Process) -> int:
    """Resident bytes."""
    return int(replica.memory_info().rss)
