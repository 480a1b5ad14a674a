"""Measures a device: the seconds per cost feature of attention, and the rate of matrix products.

Seconds are linear in `CostFeatures`. The coefficients are not negative, and fitted to a few dozen runs with the least
squared relative error: a prediction of 1 ms weighs as much as one of 10 s.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from service.core.options import AttentionOptions
from service.core.plan import PlanKind
from service.core.request import AttentionShape
from service.planning.attention_cost import CostFeatures, attention_features
from service.planning.device_profile import DeviceProfile

if TYPE_CHECKING:
    import torch

VERSION = 4  # raise it when the file, what is measured, the cost features or the kernels change
DTYPES = ("float32", "bfloat16", "float16")
MIN_REPEATS, MAX_REPEATS, MEASURE_S = 4, 5, 0.03  # per run
CACHE_BYTES = 40 * 1024**2
Progress = Callable[[float], None]  # called with the share done, 0 to 1


@dataclass(frozen=True, slots=True)
class Run:
    """One attention call to measure."""

    kind: PlanKind
    shape: AttentionShape
    is_causal: bool

    @property
    def features(self) -> CostFeatures:
        return attention_features(self.kind, self.shape, AttentionOptions(is_causal=self.is_causal))


def _sizes(kind: PlanKind, thorough: bool) -> list[tuple[int, int, int, bool]]:
    """(heads, length, head_dim, causal), from calls that are mostly overhead to calls that are mostly pairs."""
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
    """The runs that are measured for one dtype; `thorough` adds long ones."""
    return [
        Run(kind, AttentionShape(1, heads, heads, length, length, width, width, dtype), is_causal)
        for kind in PlanKind
        for heads, length, width, is_causal in _sizes(kind, thorough)
    ]


def measure(device: torch.device, *, thorough: bool = False, progress: Progress | None = None) -> DeviceProfile:
    """Measure this device: under ten seconds on two cores, or up to three minutes if `thorough`, which predicts long
    inputs better."""
    from service.device import free_bytes

    planned = [run for dtype in DTYPES for run in runs(dtype, thorough)]
    timed: dict[tuple[PlanKind, str], list[tuple[CostFeatures, float]]] = {}
    seconds = [_seconds(run, device) for run in _with_progress(planned, progress)]
    for run, took in zip(planned, seconds, strict=True):
        timed.setdefault((run.kind, run.shape.dtype), []).append((run.features, took))
    return DeviceProfile(
        device=device.type,
        attention_s_per={key: fit(*zip(*measured, strict=True)) for key, measured in timed.items()},
        linear_flops_per_s={dtype: _linear_flops_per_s(device, dtype) for dtype in DTYPES},
        free_bytes=free_bytes(device),
    )


def fit(features: Sequence[CostFeatures], seconds: Sequence[float]) -> tuple[float, ...]:
    """features [n, 5], seconds [n] -> coefficients [5], not negative, with the least sum of squared relative errors.

    Non-negative least squares by trying all 31 sets of columns. Ref: Lawson and Hanson, Solving Least Squares Problems.
    """
    rows = np.array(features, dtype=float) / np.array(seconds)[:, None]
    scale = rows.max(0)
    used = [column for column in range(rows.shape[1]) if scale[column] > 0]
    best, least = np.zeros(rows.shape[1]), np.inf
    for chosen in range(1, 2 ** len(used)):
        columns = [column for bit, column in enumerate(used) if chosen >> bit & 1]
        found, *_ = np.linalg.lstsq(rows[:, columns] / scale[columns], np.ones(len(rows)), rcond=None)
        error = float(np.square(rows[:, columns] / scale[columns] @ found - 1).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(rows.shape[1]), error
            best[columns] = found / scale[columns]
    return tuple(float(x) for x in best)


def identity(device: torch.device) -> dict[str, Any]:
    """What a measurement is valid for: the device, its threads, torch and `VERSION`."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "version": VERSION}


def _with_progress(planned: Sequence[Run], progress: Progress | None) -> Iterator[Run]:
    for index, run in enumerate(planned):
        if progress is not None:
            progress(index / len(planned))
        yield run


def _seconds(run: Run, device: torch.device) -> float:
    """Median of a few runs after a first one."""
    import torch

    from service.attention.dispatch import attend
    from service.attention.masks import MaskSpec
    from service.attention.output import no_checkpoint  # with one, as the service runs it: in time slices
    from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
    from service.attention.synthetic import InputShape, structured
    from service.device import timed

    shape = run.shape
    dtype = getattr(torch, shape.dtype)
    if run.kind is PlanKind.SPARSE:
        query, key, value = structured(
            InputShape(1, shape.heads, shape.kv_heads, shape.key_length, shape.head_dim), dtype
        )
    else:
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, shape.heads, shape.key_length, shape.head_dim, generator=draw).to(dtype) for _ in range(3)
        )
    query, key, value = (x.to(device) for x in (query, key, value))
    mask = MaskSpec(is_causal=run.is_causal)
    work: Callable[[], object] = partial(attend, query, key, value, run.kind, mask, checkpoint=no_checkpoint)
    if run.kind is PlanKind.SPARSE:
        bound = ErrorBound(max_error=1.0, exact_kind=PlanKind.CHUNKED, max_density=None)
        work = partial(attend_with_error_bound, query, key, value, mask, bound, checkpoint=no_checkpoint)
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
