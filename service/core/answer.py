"""What a caller gets back: tensors, measured error, usage, timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from service.core.plan import Plan, PlanKind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """How far an output may be from the exact one, and how that is known.

    `relative_l2` = sqrt(sum ||o - o'||^2 / sum ||o||^2) over `rows` rows drawn after selection; `relative_l2_upper`
    is its one-sided upper confidence limit. At least `coverage` of all rows err by `row_bound` or less, with
    `confidence`. `riskiest_row` is the largest error among rows that the selector itself rated worst. `recall` is
    the mean share of softmax mass that was read; moments stand for the rest. `lse_error` is the root mean square
    error of the log-sum-exp, in nats, over the same rows. `fallback`: a sparse answer was over the
    bound and this exact one replaced it.
    """

    kind: Literal["exact", "measured"] = "exact"
    relative_l2: float = 0.0
    relative_l2_upper: float = 0.0
    row_bound: float = 0.0
    rows: int = 0
    coverage: float = 1.0
    confidence: float = 1.0
    riskiest_row: float = 0.0
    recall: float = 1.0
    lse_error: float = 0.0
    fallback: bool = False
    rejected_relative_l2_upper: float | None = None  # what the replaced sparse answer measured
    certified_unread: float | None = None  # proven: no row leaves a larger share of its mass unread; absent: unproven


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One attention call inside a forward pass."""

    kind: PlanKind
    error: ErrorReport
    density: float | None
    pairs_scored: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used; body, headers, gRPC parameters, metrics and the log line all read this."""

    tokens: int
    pairs_scored: int
    pairs_dense: int
    flops: int
    flops_dense: int
    device_s: float
    peak_bytes: int
    cost_usd: float
    saved_usd: float
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    chunks: int = 0  # that inputs over the model's length were cut into
    joules: float | None = None  # None: this device has no counter that can be read
    carbon_g: float | None = None  # of CO2 equivalent, where `carbon_g_per_kwh` is configured


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds. `paused_s`: after it had begun, others had the device."""

    queue_s: float
    device_s: float
    total_s: float
    paused_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The one answer of one request. `plan` is what produced the output; `density` is measured, sparse only."""

    id: str
    tensors: Mapping[str, torch.Tensor]
    plan: Plan
    error: ErrorReport
    usage: Usage
    timing: Timing
    density: float | None = None
    model: str = "attention"
    batch_requests: int = 1
    batch_tokens: int = 0
    layers: tuple[LayerReport, ...] = ()  # forward passes with a sparse plan: every attention call
    tells_layers: bool = False  # the caller asked for each of them
    details: Any = None  # what the task tells beside tensors, as JSON


def cost_usd(device_s: float, hour_usd: float) -> float:
    return device_s * hour_usd / 3600


@dataclass(frozen=True, slots=True)
class Capacity:
    """Seconds of one device since its replica started: for requests, and for nobody; joules of the latter."""

    used_s: float
    idle_s: float
    idle_j: float | None = None
