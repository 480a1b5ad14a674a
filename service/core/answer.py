"""The answer to a request: tensors, measured error, usage, timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from service.core.plan import Plan, PlanKind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """How far an output may be from the exact one, and how that is known.

    `relative_l2` = sqrt(sum ||o - o'||^2 / sum ||o||^2) over `rows` rows drawn after selection; `relative_l2_upper`
    is its one-sided upper confidence limit. At least `coverage` of all rows err by `row_bound` or less, with
    `confidence`. `riskiest_row` is the largest error among the rows that the selector rated worst. `recall` is the
    mean share of softmax mass that was read; moments approximate the rest. `lse_error` is the root mean square error
    of the log-sum-exp, in nats, over the same rows. `fallback`: a sparse answer exceeded the bound and this exact one
    replaced it.

    `scope` says of which output. What is said of a model's last hidden state follows from the errors of its layers and
    from how far those reach, as measured at load; the fields about rows do not apply to it.
    """

    kind: Literal["exact", "measured"] = "exact"
    fallback: bool = False
    scope: Literal["attention", "worst_layer", "last_hidden_state"] = "attention"
    relative_l2: float = 0.0
    relative_l2_upper: float = 0.0
    row_bound: float = 0.0
    rows: int = 0
    coverage: float = 1.0
    confidence: float = 1.0
    riskiest_row: float = 0.0
    recall: float = 1.0
    lse_error: float = 0.0
    certified_unread: float | None = None  # proven: no row leaves a larger share of its mass unread; None: unproven
    rejected_relative_l2_upper: float | None = None  # `relative_l2_upper` of the sparse answer that was replaced


_ERROR_FIELDS = tuple(field.name for field in fields(ErrorReport))
_EXACT_FIELDS = ("kind", "fallback", "certified_unread", "rejected_relative_l2_upper")
_STATE_FIELDS = ("kind", "fallback", "scope", "relative_l2", "relative_l2_upper")


def error_fields(error: ErrorReport) -> dict[str, Any]:
    """The fields of `error` by name, as callers see them: unknown ones, an exact answer's zeros, and what does not
    apply to it are left out."""
    names = _EXACT_FIELDS if error.kind == "exact" else _ERROR_FIELDS
    if error.kind != "exact" and error.scope == "last_hidden_state":
        names = _STATE_FIELDS
    return {name: value for name in names if (value := getattr(error, name)) is not None}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One attention call inside a forward pass."""

    kind: PlanKind
    error: ErrorReport
    density: float | None
    pairs_scored: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used. Body, headers, gRPC parameters, metrics, log line and ledger all read this."""

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
    chunks: int = 0  # pieces of inputs over the model's length; 0: no input was split
    host_s: float = 0.0  # of one core: reading the request
    joules: float | None = None  # None: the device has no readable energy counter
    carbon_g: float | None = None  # CO2 equivalent; None: no `joules`, or no `carbon_g_per_kwh` configured


_USAGE_FIELDS = tuple(field.name for field in fields(Usage))


def usage_fields(usage: Usage) -> dict[str, int | float]:
    """The fields of `usage` by name, as callers see them: unknown ones, and `chunks` of 0, are left out."""
    known = {name: value for name in _USAGE_FIELDS if (value := getattr(usage, name)) is not None}
    if not usage.chunks:
        del known["chunks"]
    return known


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds. `paused_s`: after its start, while other requests had the device."""

    queue_s: float
    device_s: float
    total_s: float
    paused_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. `plan` is the one that produced the output; `density` is measured, sparse only."""

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
    shows_layers: bool = False  # the caller asked for each of them: `layer_errors`
    details: Any = None  # what the task returns besides tensors, as JSON


def cost_usd(device_s: float, hour_usd: float) -> float:
    """Price of `device_s` seconds of a device that costs `hour_usd` per hour."""
    return device_s * hour_usd / 3600


@dataclass(frozen=True, slots=True)
class Capacity:
    """Seconds of one device since its replica started, used by requests and idle, and the joules of the idle ones."""

    used_s: float
    idle_s: float
    idle_j: float | None = None
