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
from service.attention.inputs import AttentionInputs
from service.attention.rows import RowSet, attend_rows
from service.core.plan import PlanKind
from service.device import timed

EXACT_LIMIT = 32768  # tokens; up to this length every row is compared with an exact one
EXACT_ROWS = 512  # per head, above that length
ROW_SEED = 1_000_003  # added to the seed: these rows must differ from those that the audit of a sparse answer drew
SAMPLE_S = 0.001  # between two readings of the memory
BASELINE = "sdpa"

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one length. `kind` is the plan that answered: for `sparse` it may be another."""

    name: str
    kind: str
    absent: str = ""  # why it did not run; all other fields are then empty
    fallback: bool = False  # over max_error: seconds include the sparse attempt and the exact answer
    reason: str = ""
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    speedup: float | None = None  # SDPA's median divided by this median
    error: float | None = None  # true relative Frobenius error
    needle_error: float | None = None  # largest relative error of a row that looks for a planted needle
    density: float | None = None
    epsilon: float | None = None
    threshold: float | None = None  # antidiagonal only
    reported_relative_l2: float | None = None
    reported_relative_l2_upper: float | None = None
    rejected_relative_l2_upper: float | None = None  # of the sparse answer that the fallback replaced
    peak_bytes: int | None = None  # above the memory held before; includes the output


@dataclass(frozen=True, slots=True)
class Length:
    """All contenders at one length; errors are measured over `exact_rows` rows per head."""

    length: int
    exact_rows: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, slots=True)
class Growth:
    """Seconds of sparse grow with length^exponent between two lengths; the exponent is 2 for exact attention."""

    start: int
    stop: int
    exponent: float


@dataclass(frozen=True, slots=True)
class Raced:
    """The runs of one contender; `ran` and `peak_bytes` are those of the untimed run."""

    ran: Ran
    peak_bytes: int
    seconds: tuple[float, ...]
    kinds: frozenset[str]  # plans that answered in any of the runs


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact rows [H, R] and their outputs [H, R, Dv] float32; needle rows separately."""

    rows: torch.Tensor
    out: torch.Tensor
    needle_rows: torch.Tensor
    needle_out: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """Relative Frobenius error of out [1, H, L, Dv]."""
        difference = _pick(out, self.rows) - self.out
        return _norm(difference) / _norm(self.out)

    def needle_error(self, out: torch.Tensor) -> float | None:
        """Largest relative error of the rows that look for a needle; None without needles."""
        if self.needle_rows.shape[1] == 0:
            return None
        difference = _pick(out, self.needle_rows) - self.needle_out
        return float((difference.norm(dim=2) / self.needle_out.norm(dim=2)).max())


def run(settings: Settings, step: Step) -> Iterator[Length]:
    """Measure one length after the other; `step` is called before each run with its description."""
    for length in settings.lengths:
        yield measure(settings, length, step)


def steps(settings: Settings) -> int:
    """Number of calls of `step`, if every contender runs at every length."""
    return len(settings.lengths) * len(names(settings)) * (settings.rounds + 1)


def measure(settings: Settings, length: int, step: Step) -> Length:
    inputs = inputs_of(settings, length)
    candidates = contenders(settings, inputs)
    runs = {name: run for name, run in candidates.items() if not isinstance(run, Absent)}
    truth = truth_of(inputs, settings.seed)
    raced = race(runs, settings.rounds, inputs.query.device, lambda name: step(f"{length} tokens: {name}"))
    baseline_s = median(raced[BASELINE].seconds)
    rows = (
        Row(name, "absent", run.reason) if isinstance(run, Absent) else row_of(name, raced[name], truth, baseline_s)
        for name, run in candidates.items()
    )
    return Length(length, truth.rows.shape[1], tuple(rows))


def race(runs: Mapping[str, Run], rounds: int, device: torch.device, step: Step) -> dict[str, Raced]:
    """One untimed run each, in which memory is measured, then rounds in which every contender runs once, in turn."""
    first: dict[str, tuple[Ran, int]] = {}
    for name, run in runs.items():
        step(name)
        first[name] = with_peak(run, device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kinds = {name: {ran.kind} for name, (ran, _) in first.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            step(name)
            ran, took_s = timed(run, device)
            seconds[name].append(took_s)
            kinds[name].add(ran.kind)
            del ran  # so that the next one has the same memory
    return {name: Raced(*first[name], tuple(seconds[name]), frozenset(kinds[name])) for name in runs}


def row_of(name: str, found: Raced, truth: Truth, baseline_s: float) -> Row:
    ran, reported = found.ran, found.ran.told
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
    if reported is None:
        return row
    return replace(
        row,
        fallback=row.kind != PlanKind.SPARSE,
        reported_relative_l2=reported.relative_l2,
        reported_relative_l2_upper=reported.relative_l2_upper,
        rejected_relative_l2_upper=reported.rejected_relative_l2_upper,
    )


def growth(lengths: Sequence[Length]) -> list[Growth]:
    """Growth between neighbouring lengths at which sparse answered; the seconds of a fallback are not sparse's."""
    points = [
        (length.length, row.median_s, row.kind) for length in lengths if (row := length.row("sparse")) is not None
    ]
    return [
        Growth(n, m, log(second_s / first_s) / log(m / n))
        for (n, first_s, first), (m, second_s, second) in pairwise(points)
        if first == second == PlanKind.SPARSE and first_s and second_s
    ]


def figures(settings: Settings, lengths: Sequence[Length]) -> dict[str, Any]:
    """The figures that are written as JSON."""
    on_gpu = settings.device == "cuda"
    return {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "lengths": [asdict(length) for length in lengths],
        "growth": [asdict(between) for between in growth(lengths)],
    }


def truth_of(inputs: Inputs, seed: int) -> Truth:
    """Exact outputs: of SDPA in float32 for all rows of a short input, of `attend_rows` for some rows of a long one."""
    heads, length = inputs.query.shape[1:3]
    exact = AttentionInputs(*inputs.tensors, inputs.mask)
    if length <= EXACT_LIMIT:
        rows = torch.arange(length).expand(heads, -1).to(inputs.query.device)
        query, key, value = (x.float() for x in inputs.tensors)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=inputs.mask.is_causal)[0]
    else:
        draw = torch.Generator().manual_seed(seed + ROW_SEED)
        drawn = [torch.randperm(length, generator=draw)[:EXACT_ROWS] for _ in range(heads)]
        rows = torch.stack(drawn).to(inputs.query.device)
        out = attend_rows(exact, RowSet(0, rows))[0]
    sought = sorted({row for needle in inputs.needles for row in needle.rows})
    needle_rows = torch.tensor(sought, dtype=torch.int64, device=inputs.query.device).expand(heads, -1)
    needle_out = attend_rows(exact, RowSet(0, needle_rows))[0] if sought else out[:, :0]
    return Truth(rows, out, needle_rows, needle_out)


def with_peak(run: Run, device: torch.device) -> tuple[Ran, int]:
    """The result of a run, and its peak memory in bytes above the memory held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        ran = run()
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
        ran = run()
        last = process.memory_info().rss
    finally:
        done.set()
        watcher.join()
    return ran, max(peak, last) - before


def _trim() -> None:
    """Return freed memory to the system, otherwise a contender that reuses it would seem to need none. glibc only."""
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
