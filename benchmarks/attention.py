"""Seconds, errors, density and memory of attention at growing lengths; all contenders in turn, round by round."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import log
from statistics import median
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contenders import (
    Absent,
    Inputs,
    Ran,
    Run,
    Settings,
    contenders,
    inputs_of,
    names,
)
from service.attention.rows import attend_rows
from service.core.plan import PlanKind
from service.device import timed

EXACT_LIMIT = 32768  # tokens: up to here every row is compared with an exact one
EXACT_ROWS = 512  # a head's, above
ROW_SEED = 1_000_003  # added to the seed: not the rows that the audit drew, which sparse answers were judged by
SAMPLE_S = 0.001  # between two looks at the memory
BASELINE = "sdpa"

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one length. `kind` is what answered: of sparse not always sparse."""

    name: str
    kind: str
    absent: str = ""  # why it did not run; nothing else is known then
    fallback: bool = False  # over max_error: the seconds are those of the sparse attempt and the exact answer
    reason: str = ""
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    speedup: float | None = None  # SDPA's median over this one
    error: float | None = None  # true relative Frobenius error
    needle_error: float | None = None  # worst relative error of a row that looks for a planted needle
    density: float | None = None
    epsilon: float | None = None
    threshold: float | None = None  # antidiagonal only
    told_relative_l2: float | None = None
    told_relative_l2_upper: float | None = None
    rejected_relative_l2_upper: float | None = None  # of the sparse answer that a fallback replaced
    peak_bytes: int | None = None  # above what was held before, the output included


@dataclass(frozen=True, slots=True)
class Length:
    """All contenders at one length; `exact_rows` a head are what errors are over."""

    length: int
    exact_rows: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, slots=True)
class Growth:
    """Sparse seconds grow like length^exponent between two lengths; 2 for exact attention."""

    start: int
    stop: int
    exponent: float


@dataclass(frozen=True, slots=True)
class Raced:
    """What one contender did: `ran` and `peak_bytes` are of the untimed run."""

    ran: Ran
    peak_bytes: int
    seconds: tuple[float, ...]
    kinds: frozenset[str]  # what answered in any of the runs


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact rows [H, R] and their outputs [H, R, Dv] float32; needle rows apart."""

    rows: torch.Tensor
    out: torch.Tensor
    needle_rows: torch.Tensor
    needle_out: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """Relative Frobenius error of out [1, H, L, Dv]."""
        difference = _pick(out, self.rows) - self.out
        return _norm(difference) / _norm(self.out)

    def needle_error(self, out: torch.Tensor) -> float | None:
        """Of the worst of the rows that look for a needle."""
        if self.needle_rows.shape[1] == 0:
            return None
        difference = _pick(out, self.needle_rows) - self.needle_out
        return float((difference.norm(dim=2) / self.needle_out.norm(dim=2)).max())


def run(settings: Settings, step: Step) -> Iterator[Length]:
    """One length after the other; `step` is called before each run with what runs next."""
    for length in settings.lengths:
        yield measure(settings, length, step)


def steps(settings: Settings) -> int:
    """How often `step` is called, if everybody runs at every length."""
    return len(settings.lengths) * len(names(settings)) * (settings.rounds + 1)


def measure(settings: Settings, length: int, step: Step) -> Length:
    inputs = inputs_of(settings, length)
    everybody = contenders(settings, inputs)
    runs = {name: one for name, one in everybody.items() if not isinstance(one, Absent)}
    truth = truth_of(inputs, settings.seed)
    raced = race(runs, settings.rounds, inputs.query.device, lambda name: step(f"{length} tokens: {name}"))
    baseline_s = median(raced[BASELINE].seconds)
    rows = (
        Row(name, "absent", one.reason) if isinstance(one, Absent) else row_of(name, raced[name], truth, baseline_s)
        for name, one in everybody.items()
    )
    return Length(length, truth.rows.shape[1], tuple(rows))


def race(runs: Mapping[str, Run], rounds: int, device: torch.device, step: Step) -> dict[str, Raced]:
    """An untimed run each, in which memory is watched, then rounds in which everybody runs once, in turn."""
    first: dict[str, tuple[Ran, int]] = {}
    for name, one in runs.items():
        step(name)
        first[name] = with_peak(one, device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kinds = {name: {ran.kind} for name, (ran, _) in first.items()}
    for _ in range(rounds):
        for name, one in runs.items():
            step(name)
            ran, took_s = timed(one, device)
            seconds[name].append(took_s)
            kinds[name].add(ran.kind)
            del ran  # the next one must not find less memory
    return {name: Raced(*first[name], tuple(seconds[name]), frozenset(kinds[name])) for name in runs}


def row_of(name: str, found: Raced, truth: Truth, baseline_s: float) -> Row:
    ran, told = found.ran, found.ran.told
    middle = median(found.seconds)
    row = Row(
        name=name,
        kind="/".join(sorted(found.kinds)),
        reason=ran.reason,
        median_s=middle,
        min_s=min(found.seconds),
        max_s=max(found.seconds),
        speedup=baseline_s / middle,
        error=truth.error(ran.out),
        needle_error=truth.needle_error(ran.out),
        density=ran.density,
        epsilon=ran.epsilon,
        threshold=ran.threshold,
        peak_bytes=found.peak_bytes,
    )
    if told is None:
        return row
    return replace(
        row,
        fallback=row.kind != PlanKind.SPARSE,
        told_relative_l2=told.relative_l2,
        told_relative_l2_upper=told.relative_l2_upper,
        rejected_relative_l2_upper=told.rejected_relative_l2_upper,
    )


def growth(lengths: Sequence[Length]) -> list[Growth]:
    """Between neighbours of which sparse answered both; a fallback's seconds say nothing about sparse."""
    points = [(one.length, row.median_s, row.kind) for one in lengths if (row := one.row("sparse")) is not None]
    return [
        Growth(n, m, log(second_s / first_s) / log(m / n))
        for (n, first_s, first), (m, second_s, second) in pairwise(points)
        if first == second == PlanKind.SPARSE and first_s and second_s
    ]


def figures(settings: Settings, lengths: Sequence[Length]) -> dict[str, Any]:
    """What is written as JSON."""
    on_gpu = settings.device == "cuda"
    return {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "lengths": [asdict(one) for one in lengths],
        "growth": [asdict(one) for one in growth(lengths)],
    }


def truth_of(inputs: Inputs, seed: int) -> Truth:
    """From SDPA in float32 for all rows of a short input, from our exact rows for some of a long one's."""
    heads, length = inputs.query.shape[1:3]
    if length <= EXACT_LIMIT:
        rows = torch.arange(length).expand(heads, -1).to(inputs.query.device)
        query, key, value = (x.float() for x in inputs.tensors)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=inputs.mask.is_causal)[0]
    else:
        draw = torch.Generator().manual_seed(seed + ROW_SEED)
        drawn = [torch.randperm(length, generator=draw)[:EXACT_ROWS] for _ in range(heads)]
        rows = torch.stack(drawn).to(inputs.query.device)
        out = attend_rows(*inputs.tensors, inputs.mask, 0, rows)[0]
    sought = sorted({row for needle in inputs.needles for row in needle.rows})
    needle_rows = torch.tensor(sought, dtype=torch.int64, device=inputs.query.device).expand(heads, -1)
    needle_out = attend_rows(*inputs.tensors, inputs.mask, 0, needle_rows)[0] if sought else out[:, :0]
    return Truth(rows, out, needle_rows, needle_out)


def with_peak(one: Run, device: torch.device) -> tuple[Ran, int]:
    """What it returned, and the most bytes that it held at once beyond those held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        ran = one()
        torch.cuda.synchronize(device)
        return ran, torch.cuda.max_memory_allocated(device) - before
    _trim()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ran = one()
        last = process.memory_info().rss
    finally:
        done.set()
        watcher.join()
    return ran, max(peak, last) - before


def _trim() -> None:
    """Freed memory goes back first: a contender that found it ready would seem to need none. glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _pick(out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out [1, H, L, x], rows [H, R] -> [H, R, x] float32."""
    if rows.shape[1] == out.shape[2]:
        return out[0].float()
    return out[0].gather(1, rows[..., None].expand(-1, -1, out.shape[3])).float()


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
