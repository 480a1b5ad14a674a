"""A plan: how a request will be computed, its predicted cost, and the reason for the choice."""

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
    """The cost of a computation in closed form, the same on every device."""

    pairs: int = 0  # query-key pairs scored, causal counted as causal, summed over heads
    flops: int = 0
    bytes: int = 0  # read and written once each
    peak_bytes: int = 0  # inputs + output + scratch alive together


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request will be computed. Made before it is queued."""

    kind: PlanKind
    cost: Cost  # of this plan; sparse pairs are assumed until selection has run
    predicted_s: float
    reason: str
    block_size: int = 128  # tokens per key block
    selection: str | None = None  # how a sparse plan chooses its blocks
    epsilon: float | None = None  # risk per row that selection may leave in unread blocks
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: tuple[Hashable, ...] = ()  # the kind of work, from the general to the specific
    correction: float = 1.0  # learned factor for that kind of work, contained in predicted_s and shared_s
    dense_cost: Cost = Cost()  # of dense attention for the same request; savings are relative to it
    dense_s: float = 0.0  # its predicted seconds, with the correction learned for it when this plan was made
