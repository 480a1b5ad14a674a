"""One request on its way, from its first byte to its answer. Each stage adds one frozen value; none is changed later.

Neither tensors nor texts nor exceptions are kept: a cancelled timer may hold a record for minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from service.core.answer import Answer
from service.core.host_work import HostUse
from service.core.plan import Plan
from service.core.run import RunRecord, RunStats
from service.errors import Kind

Transport = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Received:
    """What a transport knows before it has read a body."""

    id: str
    transport: Transport
    endpoint: str  # the route, as metrics, ledger and log line name it
    name: str  # of its span: "POST /v1/attention"
    received_s: float  # on the engine's clock, like all times of a record
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """The request has been read and understood."""

    model: str
    tenant: str
    parsed_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    """How it will be computed."""

    plan: Plan
    planned_s: float


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer without its tensors."""

    answer: Answer
    answered_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Why it got an error instead."""

    kind: Kind
    reason: str


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What is known of one request so far. None: it did not get so far."""

    received: Received
    parsed: Parsed | None = None
    is_dry_run: bool = False  # only its price is wanted
    host: HostUse | None = None  # what reading it used so far, until it is settled
    tokenized_s: float | None = None  # None for attention, which has no tokens
    planned: Planned | None = None
    admitted_s: float | None = None
    is_running: bool = False  # on the device, even if its caller has left
    stats: RunStats | None = None  # its part of the runs that it was in
    answered: Answered | None = None
    failed: Failed | None = None  # set once, by the first to know
    ended_s: float = 0.0

    def set_answer(self, answer: Answer, now_s: float) -> None:
        self.answered = Answered(replace(answer, tensors={}, layers=(), details=None), now_s)

    def fail(self, kind: Kind, reason: str | None = None) -> bool:
        """Note the failure; False if one is noted already."""
        if self.failed is not None:
            return False
        self.failed = Failed(kind, reason or kind.value)
        return True

    @property
    def parsed_model(self) -> str:
        """The model's name as a metric label."""
        return "unknown" if self.parsed is None else self.parsed.model

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        return () if self.stats is None else self.stats.runs

    @property
    def message(self) -> str:
        """What became of it, in one word."""
        if self.failed is None:
            return "answered"
        if self.failed.kind is Kind.CANCELLED:
            return "cancelled"
        return "refused" if self.admitted_s is None and self.failed.kind is not Kind.INTERNAL else "failed"
