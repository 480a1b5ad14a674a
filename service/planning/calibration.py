"""CostFeatures into predicted seconds on this device: measured once, kept in a file, read at the next start.

Seconds are linear in what `CostFeatures` counts. The coefficients, never negative, are fitted to a few dozen runs so
that the relative errors are least: a prediction of 1 ms and one of 10 s count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from service.core.options import AttentionOptions
from service.core.plan import PlanKind
from service.core.request import AttentionShape
from service.device import free_bytes
from service.planning.attention_cost import CostFeatures, attention_features
from service.planning.device_profile import DeviceProfile

if TYPE_CHECKING:
    import torch

VERSION = 3  # of the file, of what is measured and of the kernels: a change of theirs makes old figures wrong
DTYPES = ("float32", "bfloat16", "float16")
MIN_REPEATS, MAX_REPEATS, MEASURE_S = 4, 5, 0.03  # of one figure
CACHE_BYTES = 40 * 1024**2
Progress = Callable[[float], None]  # share done


@dataclass(frozen=True, slots=True)
class Run:
    """One shape to measure, causal or not."""

    kind: PlanKind
    shape: AttentionShape
    is_causal: bool

    @property
    def effort(self) -> CostFeatures:
        return attention_features(self.kind, self.shape, AttentionOptions(is_causal=self.is_causal), block_size=128)


def _sizes(kind: PlanKind, thorough: bool) -> list[tuple[int, int, int, bool]]:
    """(heads, length, head_dim, causal): from a call that is all overhead to one that is all pairs."""
    if kind is PlanKind.SPARSE:
        short = [(1, 1024, 64, True), (4, 1024, 64, False), (1, 4096, 64, True), (4, 4096, 32, True)]
        short += [(2, 4096, 128, False), (2, 8192, 64, True)]
        more = [(8, 2048, 64, True), (1, 8192, 128, False), (8, 8192, 64, True), (2, 16384, 64, True)]
        more += [(1, 32768, 64, True), (4, 16384, 128, False)]
        return [*short, *more] if thorough else short
    short = [(1, 16, 64, False), (8, 128, 64, True), (16, 256, 32, False), (8, 512, 64, True), (1, 1024, 128, False)]
    short += [(4, 1024, 64, True), (2, 2048, 64, False), (4, 2048, 64, True)]
    more = [(1, 64, 64, True), (32, 128, 64, False), (8, 1024, 32, True), (8, 2048, 128, True), (2, 4096, 64, True)]
    more += [(1, 8192, 64, False), (4, 8192, 64, True), (8, 4096, 128, False)]
    return [*short, *more] if thorough else short


def runs(dtype: str, thorough: bool) -> list[Run]:
    """What is measured for one dtype."""
    return [
        Run(kind, AttentionShape(1, heads, heads, length, length, width, width, dtype), is_causal)
        for kind in PlanKind
        for heads, length, width, is_causal in _sizes(kind, thorough)
    ]


def measure(device: torch.device, *, thorough: bool = False, progress: Progress | None = None) -> DeviceProfile:
    """Under ten seconds on two cores; `thorough` takes up to three minutes and predicts long inputs better."""
    planned = [run for dtype in DTYPES for run in runs(dtype, thorough)]
    timed: dict[tuple[PlanKind, str], list[tuple[CostFeatures, float]]] = {}
    seconds = [_seconds(run, device) for run in _told(planned, progress)]
    for run, took in zip(planned, seconds, strict=True):
        timed.setdefault((run.kind, run.shape.dtype), []).append((run.effort, took))
    return DeviceProfile(
        device=device.type,
        attention_s_per={key: fit(*zip(*measured, strict=True)) for key, measured in timed.items()},
        linear_flops_per_s={dtype: _linear_flops_per_s(device, dtype) for dtype in DTYPES},
        free_bytes=free_bytes(device),
    )


def fit(efforts: Sequence[CostFeatures], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients >= 0 with the least sum of squared relative errors. Ref: Lawson and Hanson, NNLS, by trying every
    set of columns: there are 31."""
    rows = np.array(efforts, dtype=float) / np.array(seconds)[:, None]
    scale = rows.max(0)
    used = [column for column in range(rows.shape[1]) if scale[column] > 0]
    best, least = np.zeros(rows.shape[1]), np.inf
    for chosen in range(1, 2 ** len(used)):
        columns = [column for place, column in enumerate(used) if chosen >> place & 1]
        found, *_ = np.linalg.lstsq(rows[:, columns] / scale[columns], np.ones(len(rows)), rcond=None)
        error = float(np.square(rows[:, columns] / scale[columns] @ found - 1).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(rows.shape[1]), error
            best[columns] = found / scale[columns]
    return tuple(float(x) for x in best)


def _told(planned: Sequence[Run], progress: Progress | None) -> Iterator[Run]:
    for index, run in enumerate(planned):
        if progress is not None:
            progress(index / len(planned))
        yield run


def _seconds(run: Run, device: torch.device) -> float:
    """Median of a few runs after a first one."""
    import torch

    from service.attention import DEFAULT_EPSILON
    from service.attention.masks import MaskSpec
    from service.attention.output import no_checkpoint  # with one, as the service runs it: in time slices
    from service.attention.sparse.bounded_error import attend_with_error_bound
    from service.attention.synthetic import structured
    from service.core.plan import Cost, Plan
    from service.device import timed

    shape = run.shape
    dtype = getattr(torch, shape.dtype)
    if run.kind is PlanKind.SPARSE:
        query, key, value = structured(1, shape.heads, shape.kv_heads, shape.key_length, shape.head_dim, dtype)
    else:
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, shape.heads, shape.key_length, shape.head_dim, generator=draw).to(dtype) for _ in range(3)
        )
    query, key, value = (x.to(device) for x in (query, key, value))
    plan = Plan(run.kind, Cost(0, 0, 0, 0), 0.0, "calibration", epsilon=DEFAULT_EPSILON)
    mask = MaskSpec(is_causal=run.is_causal)
    work = partial(
        attend_with_error_bound, query, key, value, plan, mask, max_error=1.0, forced=True, checkpoint=no_checkpoint
    )
    times: list[float] = []
    others = torch.zeros(CACHE_BYTES // 4, device=device)
    with torch.inference_mode():
        while len(times) < MAX_REPEATS and (len(times) < MIN_REPEATS or sum(times) < MEASURE_S):
            if run.kind is not PlanKind.SPARSE:  # never so short that it matters
                others.zero_()  # requests find the caches full of what ran before them, and so must this
            times.append(timed(work, device)[1])
    return median(times[1:])


def _linear_flops_per_s(device: torch.device, dtype: str) -> float:
    import torch

    from service.device import timed

    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(384, 1536, generator=draw).to(device, getattr(torch, dtype))
    rows = torch.randn(256, 384, generator=draw).to(device, getattr(torch, dtype))
    return 2 * 256 * 384 * 1536 / min(timed(lambda: rows @ matrix, device)[1] for _ in range(5))
