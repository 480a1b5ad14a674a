"""Attention at capacity and at twice of it, open loop: goodput, refusals, and whether their Retry-After was right.

Every tenth of a second an estimate, which runs nothing, asks whether a request would be taken. Each refusal tells
seconds; what was so is when the next estimate was taken.
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

from benchmarks.client import (
    Connection,
    Sample,
    drive,
    open_loop,
    poisson,
    post,
)
from benchmarks.servers.process import ours, replicas

HOST = "127.0.0.1"
LENGTHS = (512, 768, 1024, 1536)  # tokens, 8 heads of 64
MAX_QUEUE_S = 10.0
POLL_S = 0.1
SETTLE_S = 15.0  # after the last answer, before its memory is looked at


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    duration_s: float = 40.0
    factor: float = 2.0
    first_port: int = 22100


@dataclass(slots=True)
class Figures:
    """What one run did."""

    capacity_per_s: float
    at_capacity_per_s: float = 0.0  # of answers within the run
    at_overload_per_s: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    retry_told_s: list[float] = field(default_factory=list)
    retry_really_s: list[float] = field(default_factory=list)
    memory_before: int = 0
    memory_peak: int = 0
    memory_after: int = 0

    @property
    def right(self) -> float:
        """Share of the refusals whose Retry-After was within a factor of two of what was so."""
        pairs = list(zip(self.retry_told_s, self.retry_really_s, strict=True))
        return sum(0.5 <= told / max(really, 1e-9) <= 2.0 for told, really in pairs) / len(pairs) if pairs else 1.0


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
        found = watched(port, sent, settings.duration_s if watch else 0.0, replica)
        samples, told, figures.memory_peak = uvloop.run(found)
        within = sum(one.status == 200 and one.at_s + one.latency_s <= settings.duration_s for one in samples)
        if not watch:
            figures.at_capacity_per_s = within / settings.duration_s
            continue
        figures.at_overload_per_s = within / settings.duration_s
        figures.statuses = {str(code): count for code, count in sorted(Counter(s.status for s in samples).items())}
        figures.retry_told_s, figures.retry_really_s = [one[0] for one in told], [one[1] for one in told]
    time.sleep(SETTLE_S)
    figures.memory_after = memory(replica)
    return figures


async def watched(
    port: int, sent: list[tuple[float, bytes]], watch_s: float, replica: psutil.Process
) -> tuple[list[Sample], list[tuple[float, float]], int]:
    """The run, and beside it (told, really) seconds of refusals that an observer got from estimates, and the most
    memory."""
    load = asyncio.create_task(open_loop(HOST, port, sent))
    most = asyncio.create_task(most_memory(replica, load))
    told = await observe(port, watch_s) if watch_s else []
    return await load, told, await most


async def most_memory(replica: psutil.Process, until: asyncio.Task[list[Sample]]) -> int:
    most = 0
    while not until.done():
        most = max(most, memory(replica))
        await asyncio.sleep(POLL_S)
    return most


async def observe(port: int, duration_s: float) -> list[tuple[float, float]]:
    """Asks what a request would be told; after a refusal, until it would be taken."""
    connection = await Connection.open(HOST, port)
    found: list[tuple[float, float]] = []
    start_s = time.perf_counter()
    refused: list[tuple[float, float]] = []  # (when, seconds told) since the queue was last open
    body = {"attention": {"heads": 8, "query_length": LENGTHS[-1], "head_dim": 64}}
    ask = post(HOST, port, "/v1/estimate", orjson.dumps(body))
    while (now_s := time.perf_counter() - start_s) < duration_s:
        _, answer = await connection.send(ask)
        estimate: dict[str, Any] = orjson.loads(answer)
        if estimate["would_admit"]:
            found += [(told_s, now_s - at_s) for at_s, told_s in refused]
            refused = []
        elif "retry_after_s" in estimate:
            refused.append((now_s, estimate["retry_after_s"]))
        await asyncio.sleep(POLL_S)
    connection.close()
    return found


def requests(port: int) -> list[bytes]:
    """Safetensors bodies, built before."""
    from safetensors.torch import save

    from service.attention.synthetic import structured

    found = []
    for length in LENGTHS:
        query, key, value = structured(1, 8, 8, length, 64)
        options = json.dumps({"mode": "chunked", "timeout_s": 60})
        body = save({"query": query, "key": key, "value": value}, metadata={"options": options})
        found.append(post(HOST, port, "/v1/attention", body, "application/x-safetensors"))
    return found


def memory(replica: psutil.Process) -> int:
    """Resident bytes."""
    return int(replica.memory_info().rss)
