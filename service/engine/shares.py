"""The measured time of a batch, shared over its members by FLOPs so that the shares add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence


def shares(total_s: float, flops: Sequence[int]) -> list[float]:
    """Each member's part of `total_s`; exact in sum (the last member takes the rounding). Equal where no FLOPs."""
    total = sum(flops)
    parts = [total_s * count / total if total else total_s / len(flops) for count in flops[:-1]]
    return [*parts, max(0.0, total_s - sum(parts))]
