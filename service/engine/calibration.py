"""Work into predicted seconds on this device: a few short measurements at start.

The numbers are rates of this machine at one middle size each; `predict` is linear in FLOPs above a fixed cost per
call. That is right within a small factor, which is what ordering, batching and refusals need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core import PlanKind, Work

if TYPE_CHECKING:
    import torch

MIN_PAIR_FLOPS = 128  # head_dim 32
MAX_REPEATS = 5
MEASURE_S = 0.05  # of one figure; sixteen are measured


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Measured speed of one device. Rates in FLOP/s by (plan kind, dtype); overhead in seconds a call."""

    device: str
    attention_flops_per_s: Mapping[tuple[PlanKind, str], float]
    linear_flops_per_s: Mapping[str, float]
    overhead_s: Mapping[PlanKind, float]
    free_bytes: int

    def attention_s(self, kind: PlanKind, work: Work, dtype: str) -> float:
        # the exponential and the bookkeeping of a pair take as long as the products of a small head
        flops = max(work.flops, MIN_PAIR_FLOPS * work.pairs)
        return self.overhead_s[kind] + flops / self.attention_flops_per_s[kind, dtype]

    def forward_s(self, work: Work, attention_flops: int, dtype: str, passes_s: float) -> float:
        """Packed forward passes: their fixed part, matrix products at the linear rate, attention at the dense one."""
        return (
            passes_s
            + (work.flops - attention_flops) / self.linear_flops_per_s[dtype]
            + attention_flops / self.attention_flops_per_s[PlanKind.DENSE, dtype]
        )


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of the GPU, or of the machine within its cgroup."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(current.read()))
    except FileNotFoundError:
        pass  # no cgroup v2 memory controller: the machine's own figure stands
    return max(available, 0)


def measure(
    device: torch.device, *, block_size: int, dtypes: tuple[str, ...] = ("float32", "bfloat16")
) -> DeviceProfile:
    """Under two seconds on two cores. float16 is taken as bfloat16's rate: both are half-width everywhere we run."""
    import torch

    from service.attention import attend
    from service.attention.masks import MaskSpec
    from service.core import Plan
    from service.engine.cost import pair_flops

    def seconds(run: Callable[[], object]) -> float:
        """The fastest of a few runs after a warm-up: noise only ever adds."""
        run()
        times: list[float] = []
        while len(times) < MAX_REPEATS and sum(times) < MEASURE_S:
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    generator = torch.Generator().manual_seed(0)
    rates: dict[tuple[PlanKind, str], float] = {}
    linear: dict[str, float] = {}
    overhead: dict[PlanKind, float] = {}
    for dtype in dtypes:
        torch_dtype = getattr(torch, dtype)
        tiny = torch.randn(1, 1, 4, 16, generator=generator).to(device, torch_dtype)
        for kind, length, heads in ((PlanKind.DENSE, 1024, 4), (PlanKind.CHUNKED, 1024, 4), (PlanKind.SPARSE, 1024, 2)):
            tensor = torch.randn(1, heads, length, 64, generator=generator).to(device, torch_dtype)
            plan = Plan(
                kind, Work(0, 0, 0, 0), 0.0, "calibration", block_size=block_size, selection="moments", epsilon=1e-9
            )
            spec = MaskSpec()
            base = seconds(lambda: attend(tiny, tiny, tiny, plan, spec))  # noqa: B023 (called at once)
            total = seconds(lambda: attend(tensor, tensor, tensor, plan, spec))  # noqa: B023
            # the rate includes the fixed part: never faster than what was seen
            rates[kind, dtype] = pair_flops(heads * length * length, 64, 64) / total
            overhead[kind] = max(overhead.get(kind, 0.0), base)
        matrix = torch.randn(384, 1536, generator=generator).to(device, torch_dtype)
        rows = torch.randn(256, 384, generator=generator).to(device, torch_dtype)
        linear[dtype] = 2 * 256 * 384 * 1536 / seconds(lambda: rows @ matrix)  # noqa: B023
    for kind in PlanKind:
        rates[kind, "float16"] = rates[kind, "bfloat16"]
    linear["float16"] = linear["bfloat16"]
    return DeviceProfile(
        device=device.type,
        attention_flops_per_s=rates,
        linear_flops_per_s=linear,
        overhead_s=overhead,
        free_bytes=free_bytes(device),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
