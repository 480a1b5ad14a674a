"""Short embeddings while a long attention request is always in flight: fair scheduling and first in, first out.

Two services are started in turn that differ only in the order of their queue. Short requests are sent in an open loop
(Poisson) and timed from when they were due; a separate process sends long requests one after another.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median

import orjson
import uvloop
from safetensors.torch import save

from benchmarks.client import drive, exchanged, open_loop, poisson, post
from benchmarks.servers.lineup import LINEUP, MODEL, Place, by_arrival
from benchmarks.servers.process import ours
from benchmarks.serving import percentile
from benchmarks.throughput import WORDS
from service.attention.synthetic import InputShape, structured

ORDERS = ("fair", "arrival")
HOST = "127.0.0.1"
MAX_WORDS = 60  # at most 64 tokens
CAPACITY_REQUESTS, CAPACITY_CLIENTS = 1500, 32
SLICE_METRIC = "farsight_slice_seconds_bucket"


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    tokens: int = 32768
    mode: str = "auto"
    dtype: str = "float32"
    load: float = 0.3
    duration_s: float = 40.0
    first_port: int = 21700


@dataclass(frozen=True, slots=True)
class Figures:
    """Results for one order. `beside`: while short and long requests run together."""

    capacity_per_s: float
    rate_per_s: float
    long_alone_s: float
    short_alone_p50_s: float
    short_alone_p99_s: float
    long_beside_s: float
    long_requests: int
    short_beside_p50_s: float
    short_beside_p99_s: float
    short_requests: int
    slices: dict[str, float]

    @property
    def bound_s(self) -> float:
        """Limit for the p99 of short requests while long ones run."""
        return 2 * self.short_alone_p99_s + 0.05


def run(settings: Settings, model: Path, step: Callable[[str], None]) -> dict[str, Figures]:
    return {order: measure(settings, order, model, step) for order in ORDERS}


def measure(settings: Settings, order: str, model: Path, step: Callable[[str], None]) -> Figures:
    sample = short_requests(settings.first_port, 200, seed=9)
    farsight = LINEUP[0] if order == "fair" else replace(LINEUP[0], command=by_arrival)
    with ours(model, settings.first_port, {}, sample[0], farsight) as (place, _):
        return _measured(settings, order, place, sample, step)


def _measured(
    settings: Settings, order: str, place: Place, sample: list[bytes], step: Callable[[str], None]
) -> Figures:
    port = place.port
    uvloop.run(drive(HOST, port, sample, CAPACITY_CLIENTS))  # warms up
    step(f"{order}: capacity")
    took_s, _ = uvloop.run(drive(HOST, port, short_requests(port, CAPACITY_REQUESTS, 1), CAPACITY_CLIENTS))
    capacity = CAPACITY_REQUESTS / took_s
    rate = settings.load * capacity
    at_s = poisson(rate, settings.duration_s, seed=2)
    shorts = list(zip(at_s, short_requests(port, len(at_s), 3), strict=True))
    body = place.scratch / "long.safetensors"
    body.write_bytes(long_body(settings))
    step(f"{order}: long alone")
    alone_s = [_send_long(port, body.read_bytes()) for _ in range(4)][1:]
    step(f"{order}: short alone")
    alone = uvloop.run(open_loop(HOST, port, shorts))
    step(f"{order}: both")
    with long_requests(port, body) as taken:
        beside = uvloop.run(open_loop(HOST, port, shorts))
    failed = [sample for sample in (*alone, *beside) if sample.status != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} short requests failed: {failed[0].status} {failed[0].body[:200]!r}")
    before, after = ([sample.latency_s for sample in run] for run in (alone, beside))
    return Figures(
        capacity,
        rate,
        median(alone_s),
        percentile(before, 0.5),
        percentile(before, 0.99),
        median(taken),
        len(taken),
        percentile(after, 0.5),
        percentile(after, 0.99),
        len(after),
        slices(port + 2),
    )


def short_requests(port: int, count: int, seed: int) -> list[bytes]:
    """Texts of up to 64 tokens."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(3, MAX_WORDS))) for _ in range(count))
    options = {"model": MODEL, "truncate": "end", "timeout_s": 120}
    return [post(HOST, port, "/v1/embeddings", orjson.dumps({**options, "input": text})) for text in texts]


def long_body(settings: Settings) -> bytes:
    """Causal self-attention, 8 heads of 64."""
    import torch

    query, key, value = structured(InputShape(1, 8, 8, settings.tokens, 64), getattr(torch, settings.dtype))
    options = json.dumps({"is_causal": True, "mode": settings.mode})
    return save({"query": query, "key": key, "value": value}, metadata={"options": options})


@contextmanager
def long_requests(port: int, body: Path) -> Iterator[list[float]]:
    """Keep a long request in flight during the block; the list of their seconds is filled at the end of the block."""
    context = multiprocessing.get_context("spawn")
    stop, results = context.Event(), context.Queue()
    process = context.Process(target=_send_until, args=(port, str(body), stop, results))
    process.start()
    results.get(timeout=60)  # the process is about to send the first one
    taken: list[float] = []
    try:
        yield taken
    finally:
        stop.set()
        taken += results.get(timeout=600)
        process.join()


def _send_until(port: int, body: str, stop: Event, results: multiprocessing.Queue[list[float]]) -> None:
    content, taken = Path(body).read_bytes(), []
    results.put([])
    while not stop.is_set():
        taken.append(_send_long(port, content))
    results.put(taken)


def _send_long(port: int, content: bytes) -> float:
    binary = "application/x-safetensors"
    start = time.perf_counter()
    connection = HTTPConnection(HOST, port, timeout=600)
    connection.request("POST", "/v1/attention", content, {"content-type": binary, "accept": binary})
    answer = connection.getresponse()
    got = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"long request: status {answer.status}: {got[:200]!r}")
    return time.perf_counter() - start


def slices(port: int) -> dict[str, float]:
    """Number of runs by the longest time for which each blocked the device: {seconds at most: runs}, cumulative."""
    request = f"GET /metrics HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode()
    text = uvloop.run(exchanged(HOST, port, [request], 1)).bodies[0].decode()
    lines = (line for line in text.splitlines() if line.startswith(SLICE_METRIC))
    return {line.split('le="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
