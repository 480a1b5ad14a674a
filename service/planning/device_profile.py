"""The measured speed of one device, and the seconds that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.core.plan import PlanKind
from service.planning.attention_cost import CostFeatures

LEAST_S = 1e-6  # no prediction is zero: work of zero seconds cannot be ordered


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """The measured speed of one device.

    `attention_s_per`: seconds per unit of each cost feature, by plan and dtype. `linear_flops_per_s`: FLOP/s of matrix
    products, by dtype. `free_bytes`: memory that was free when the profile was measured or read.
    """

    device: str
    attention_s_per: Mapping[tuple[PlanKind, str], tuple[float, ...]]
    linear_flops_per_s: Mapping[str, float]
    free_bytes: int

    def attention_s(self, kind: PlanKind, features: CostFeatures, dtype: str) -> float:
        """Predicted seconds of attention with these features, at least `LEAST_S`."""
        seconds = sum(each * count for each, count in zip(self.attention_s_per[kind, dtype], features, strict=True))
        return max(LEAST_S, seconds)

    def call_s(self, kind: PlanKind, dtype: str) -> float:
        """The seconds of a call that a batch pays once."""
        return self.attention_s_per[kind, dtype][0]

    def forward_s(self, linear_flops: int, dtype: str, passes_s: float) -> float:
        """Predicted seconds of forward passes without their attention.

        `passes_s`: the fixed part of all passes. Matrix products run at the measured rate.
        """
        return passes_s + linear_flops / self.linear_flops_per_s[dtype]
