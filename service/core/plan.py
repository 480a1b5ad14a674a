"""How a request will be computed, what that costs, and why."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum


class PlanKind(StrEnum):
    """How attention is computed."""

    DENSE = "dense"
    CHUNKED = "chunked"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a computation costs in closed form, before any device is named."""

    pairs: int  # query-key pairs scored, causal counted as causal, summed over heads
    flops: int
    bytes: int  # read and written once each
    peak_bytes: int  # inputs + output + scratch alive together


@dataclass(frozen=True, slots=True)
class Plan:
    """Decided before the queue: how a request will be computed, what that costs, and why."""

    kind: PlanKind
    cost: Cost
    predicted_s: float
    reason: str
    block_size: int = 128  # tokens per key block
    selection: str | None = None  # how sparse blocks are chosen
    epsilon: float | None = None  # risk that a row may leave in a block that is not read
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: tuple[Hashable, ...] = ()  # the kind of work, from the general to the special
    pace: float = 1.0  # learned of that kind, and contained in both seconds
