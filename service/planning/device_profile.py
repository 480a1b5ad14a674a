"""Measured speed of one device, and the seconds that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.core.plan import PlanKind
from service.planning.attention_cost import CostFeatures

LEAST_S = 1e-6  # nothing is free: work that was predicted to take no time could not be ordered


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Measured speed of one device: seconds per cost feature of a plan and dtype, FLOP/s of linear layers."""

    device: str
    attention_s_per: Mapping[tuple[PlanKind, str], tuple[float, ...]]
    linear_flops_per_s: Mapping[str, float]
    free_bytes: int

    def attention_s(self, kind: PlanKind, effort: CostFeatures, dtype: str) -> float:
        seconds = sum(each * count for each, count in zip(self.attention_s_per[kind, dtype], effort, strict=True))
        return max(LEAST_S, seconds)

    def call_s(self, kind: PlanKind, dtype: str) -> float:
        """The part of a prediction that a batch pays once."""
        return self.attention_s_per[kind, dtype][0]

    def forward_s(self, linear_flops: int, dtype: str, passes_s: float) -> float:
        """Forward passes without their attention: their fixed part, and matrix products at the linear rate."""
        return passes_s + linear_flops / self.linear_flops_per_s[dtype]
