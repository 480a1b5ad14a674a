"""Accuracy of predictions in a running engine: predicted and actual device seconds of mixed real requests.

A run is one request, or a batch of requests that arrived together. The members of a batch share fixed costs, so the
prediction for the batch is compared with its time. Corrected predictions and those of calibration alone are compared on
the same runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median, quantiles

import torch
from prometheus_client import CollectorRegistry

from service.attention.synthetic import InputShape, structured
from service.config import Config
from service.core.options import AttentionOptions, EmbedOptions
from service.core.plan import PlanKind
from service.core.request import (
    AttentionRequest,
    AttentionShape,
    ForwardRequest,
    Request,
)
from service.engine.engine import Engine
from service.models.demo import DEMO_MODEL
from service.planning.correction import PredictionCorrector, WorkPath
from service.telemetry.metrics import Metrics

WITHIN = 0.25
WORDS = ("attention", "compares", "every", "token", "with", "other", "somebody", "pays", "the", "animal", "street")


@dataclass(frozen=True, slots=True)
class Run:
    """One run on the device."""

    path: WorkPath
    bare_s: float  # predicted by calibration alone
    predicted_s: float  # with learned corrections
    used_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """Shares of the runs within 25 % of the actual time after the warm-up, and the median of actual over predicted."""

    runs: int
    within: float
    within_bare: float
    median_ratio: float
    median_ratio_bare: float
    kinds: dict[str, tuple[int, float, float]]  # by model or plan: runs, within, within_bare
    estimate_s: dict[str, tuple[float, float]]  # p50 and p99 of an estimate


class _Recorder(PredictionCorrector):
    """Learns as usual and records the runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[WorkPath, float, float]] = []

    def learn(self, path: WorkPath, predicted_s: float, used_s: float) -> None:
        super().learn(path, predicted_s, used_s)
        self.runs.append((path, predicted_s, used_s))


class _RecordingMetrics(Metrics):
    """Records the prediction of each run."""

    def predicted(self, kind: PlanKind, predicted_s: float, used_s: float) -> None:
        super().predicted(kind, predicted_s, used_s)
        self.predictions.append(predicted_s)

    predictions: list[float]


def mix(count: int, seed: int) -> Iterator[list[Request]]:
    """Groups of requests that arrive together: texts, or attention of a few clients, each with its own heads and mode
    and varying lengths."""
    draw = random.Random(seed)
    clients = [
        # heads, key heads, head_dim, dtype, causal, mode, shortest and longest
        (8, 8, 64, "float32", True, "auto", 128, 2048),
        (8, 2, 64, "bfloat16", True, "auto", 256, 4096),
        (4, 4, 128, "float32", False, "auto", 64, 1024),
        (12, 12, 32, "float32", False, "dense", 32, 512),
        (8, 8, 64, "float32", True, "chunked", 256, 2048),
        (4, 4, 64, "bfloat16", False, "chunked", 256, 2048),
        (2, 2, 64, "float32", True, "auto", 6144, 16384),
        (4, 1, 64, "float32", True, "sparse", 1024, 8192),
        (2, 2, 128, "bfloat16", False, "sparse", 2048, 8192),
    ]
    for number in range(count):
        together = draw.choice([1, 1, 1, draw.randint(2, 12)])
        if draw.random() < 0.4:
            yield [_texts(draw, f"{number}-{at}") for at in range(together)]
            continue
        heads, kv_heads, width, dtype, is_causal, mode, shortest, longest = draw.choice(clients)
        length = int(shortest * (longest / shortest) ** draw.random())
        together = together if length <= 512 else 1
        options = AttentionOptions(is_causal=is_causal, mode=mode)
        found: list[Request] = []
        for at in range(together):
            query, key, value = structured(
                InputShape(1, heads, kv_heads, length, width), getattr(torch, dtype), seed=number + at
            )
            found.append(AttentionRequest(f"{number}-{at}", query, key, value, options))
        yield found


def _texts(draw: random.Random, name: str) -> ForwardRequest:
    texts = tuple(
        " ".join(draw.choices(WORDS, k=draw.choice([5, 20, 60, 150]))) for _ in range(draw.choice([1, 1, 4, 16]))
    )
    return ForwardRequest(name, DEMO_MODEL.name, "embed", EmbedOptions(), texts)


def run(warm: int, count: int, seed: int) -> Round:
    """Run `warm` arrivals to learn from, then `count` arrivals that are compared too."""
    recorded, first, estimate_s = record(warm, count, seed)
    return summary(recorded[first:], estimate_s)


def record(warm: int, count: int, seed: int) -> tuple[list[Run], int, dict[str, tuple[float, float]]]:
    """(all runs, number of warm-up runs, p50 and p99 latency of estimates by kind)."""
    recorder, metrics = _Recorder(), _RecordingMetrics(CollectorRegistry())
    metrics.predictions = []
    engine = Engine.start(Config(models=(DEMO_MODEL,)), metrics)
    engine.pricing.corrector = engine.execution.corrector = recorder
    try:
        first = asyncio.run(_drive(engine, recorder, warm, count, seed))
        runs = len(recorder.runs)
        estimate_s = asyncio.run(_estimates(engine))
        assert len(recorder.runs) == runs, "bug: an estimate used the device"
    finally:
        engine.close()
    found = [
        Run(path, bare_s, predicted_s, used_s)
        for (path, bare_s, used_s), predicted_s in zip(recorder.runs, metrics.predictions, strict=True)
    ]
    return found, first, estimate_s


async def _estimates(engine: Engine) -> dict[str, tuple[float, float]]:
    """Latencies for attention sizes, each requested once so that none is cached, and for a text of ~60 tokens."""
    found: dict[str, list[float]] = {"attention": [], "text": []}
    text = ForwardRequest("e", DEMO_MODEL.name, "embed", EmbedOptions(), (" ".join(WORDS * 4),))
    for number in range(500):
        shape = AttentionShape(1, 8, 8, 1000 + number, 1000 + number, 64, 64)
        start_s = time.perf_counter()
        engine.estimate(shape, AttentionOptions(is_causal=True))
        found["attention"].append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        await engine.priced(text)
        found["text"].append(time.perf_counter() - start_s)
    return {name: (median(times), quantiles(times, n=100)[98]) for name, times in found.items()}


async def _drive(engine: Engine, recorder: _Recorder, warm: int, count: int, seed: int) -> int:
    """Submit all arrivals; returns the number of warm-up runs."""
    first = 0
    for number, requests in enumerate(mix(warm + count, seed)):
        if number == warm:
            first = len(recorder.runs)
        await asyncio.gather(*(engine.submit(request) for request in requests))
    return first


def summary(runs: list[Run], estimate_s: dict[str, tuple[float, float]]) -> Round:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        general = run.path[0]
        assert isinstance(general, tuple), "bug: a kind of work without its first step"
        together = ", together" if isinstance(run.path[2], tuple) and run.path[2][0] == "batch" else ""
        kinds.setdefault(f"{general[0]} {general[1]}{together}", []).append(run)
    return Round(
        runs=len(runs),
        within=_share(runs, learned=True),
        within_bare=_share(runs, learned=False),
        median_ratio=median(run.used_s / run.predicted_s for run in runs),
        median_ratio_bare=median(run.used_s / run.bare_s for run in runs),
        kinds={
            name: (len(own), _share(own, learned=True), _share(own, learned=False))
            for name, own in sorted(kinds.items())
        },
        estimate_s=estimate_s,
    )


def _share(runs: list[Run], *, learned: bool) -> float:
    return mean(abs((run.predicted_s if learned else run.bare_s) / run.used_s - 1) <= WITHIN for run in runs)
