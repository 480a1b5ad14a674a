"""One request from its first byte to its answer, as a log line and spans tell it. Nothing is kept where neither is on.

A transport follows a request; the engine adds what it learns; when both are done with it, it is told once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from service.config import Config
from service.core.answer import Answer, cost_usd
from service.core.plan import Plan
from service.errors import CODES, Kind
from service.telemetry.energy import carbon_g

if TYPE_CHECKING:
    from service.engine.runner import Job, Result, RunRecord
    from service.telemetry.tracing import Tracing

logger = logging.getLogger("farsight")

Field = str | int | float | bool


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What is known of one request so far. Times are the engine's clock, in seconds; None: it did not come so far.

    Neither tensors nor texts nor exceptions are kept: a cancelled timer may hold this for minutes.
    """

    id: str
    transport: Literal["http", "grpc"]
    endpoint: str
    name: str  # of its span: "POST /v1/attention"
    received_s: float
    traceparent: str | None = None
    tracestate: str | None = None
    model: str | None = None
    tenant: str | None = None
    parsed_s: float | None = None
    tokenized_s: float | None = None
    plan: Plan | None = None
    planned_s: float | None = None
    admitted_s: float | None = None
    is_running: bool = False  # on the device, whoever still waits
    runs: tuple[RunRecord, ...] = ()
    device_s: float = 0.0
    joules: float | None = None
    answer: Answer | None = None  # without its tensors
    answered_s: float | None = None
    ended_s: float = 0.0
    failure: Kind | None = None
    reason: str | None = None

    def answered(self, answer: Answer, now_s: float) -> None:
        self.answer, self.answered_s = replace(answer, tensors={}, layers=(), details=None), now_s

    @property
    def message(self) -> str:
        """What became of it, in a word."""
        if self.failure is None:
            return "answered"
        if self.failure is Kind.CANCELLED:
            return "cancelled"
        return "refused" if self.admitted_s is None and self.failure is not Kind.INTERNAL else "failed"


# ambient, like OpenTelemetry's own current span: the handlers between a transport and the engine pass nothing on
_CURRENT: ContextVar[RequestRecord | None] = ContextVar("trail", default=None)


def failed(kind: Kind, reason: str | None = None) -> None:
    """The request that this task answers gets an error; nothing where it is not followed."""
    if (trail := _CURRENT.get()) is not None:
        trail.failure, trail.reason = kind, reason or kind.value


class RequestRecorder:
    """Follows requests, and tells each once."""

    def __init__(self, config: Config, clock: Callable[[], float], hour_usd: float, tracing: Tracing | None) -> None:
        self._config, self._clock, self._hour_usd, self._tracing = config, clock, hour_usd, tracing
        self._open: set[RequestRecord] = set()  # their callers have been answered, and the device still works for them
        self._is_over = False  # it never will again

    @classmethod
    def of(cls, config: Config, clock: Callable[[], float], hour_usd: float) -> RequestRecorder | None:
        """None where neither log lines nor traces are wanted. RuntimeError: traces are, and cannot be sent."""
        if config.otlp_endpoint is None:
            return cls(config, clock, hour_usd, None) if config.request_log else None
        from service.telemetry.tracing import Tracing  # OpenTelemetry

        return cls(config, clock, hour_usd, Tracing(config.otlp_endpoint, config.trace_ratio, clock))

    @contextmanager
    def follow(self, trail: RequestRecord) -> Iterator[RequestRecord]:
        """Around everything that answers a request, to the last byte of its body; sending that is not in it."""
        token = _CURRENT.set(trail)
        try:
            yield trail
        except asyncio.CancelledError:
            failed(Kind.CANCELLED)
            raise
        finally:
            _CURRENT.reset(token)
            trail.ended_s = self._clock()
            if trail.is_running:
                self._open.add(trail)
            else:
                self._tell(trail)
            if self._is_over:
                self.give_up()

    # -- the engine -------------------------------------------------------------------------------------------------

    def entered(self, endpoint: str, model: str, tenant: str) -> RequestRecord | None:
        """The current request is parsed. None: no transport follows it."""
        if (trail := _CURRENT.get()) is not None:
            trail.endpoint, trail.model, trail.tenant, trail.parsed_s = endpoint, model, tenant, self._clock()
        return trail

    def tokenized(self) -> None:
        if (trail := _CURRENT.get()) is not None:
            trail.tokenized_s = self._clock()

    def started(self, jobs: Sequence[Job]) -> None:
        """The device takes them; on its thread, before which nobody can have seen a result."""
        for job in jobs:
            if job.trail is not None:
                job.trail.is_running = True

    def ran(self, trail: RequestRecord, result: Result) -> None:
        """The device is done with it."""
        trail.is_running = False
        trail.runs, trail.device_s, trail.joules = result.runs, result.device_s, result.joules
        if trail in self._open:
            self._open.remove(trail)
            self._tell(trail)

    def give_up(self) -> None:
        """The device ended: no result will come for what is still open."""
        self._is_over = True
        while self._open:
            self._tell(self._open.pop())

    def close(self) -> None:
        """Tell the rest and send what waits, for a short time at most."""
        self.give_up()
        if self._tracing is not None:
            self._tracing.close()

    # -- telling ----------------------------------------------------------------------------------------------------

    def _tell(self, trail: RequestRecord) -> None:
        traced = None if self._tracing is None else self._tracing.sampled(trail)
        if traced is None and not self._config.request_log:
            return
        told = self.record(trail)
        if self._config.request_log:
            trace = {} if traced is None else {"trace_id": f"{traced.trace_id:032x}"}
            logger.info(trail.message, extra={"fields": told | trace})
        if self._tracing is not None and traced is not None:
            self._tracing.tell(trail, told, traced)

    def record(self, trail: RequestRecord) -> dict[str, Field]:
        """The usage record of a request, answered or not: its log line, and the attributes of its span."""
        told: dict[str, Field | None] = {
            "request_id": trail.id,
            "transport": trail.transport,
            "endpoint": trail.endpoint,
            "code": 200 if trail.failure is None else CODES[trail.failure].http,
            "kind": trail.failure and trail.failure.value,
            "reason": trail.reason,
            "tenant": trail.tenant,
            "model": trail.model,
        }
        told |= _unanswered(trail, self._config, self._hour_usd) if trail.answer is None else _answered(trail.answer)
        return {name: value for name, value in told.items() if value is not None}


def _answered(answer: Answer) -> dict[str, Field | None]:
    usage, timing, error = answer.usage, answer.timing, answer.error
    return {
        "plan": answer.plan.kind.value,
        "predicted_s": round(answer.plan.predicted_s, 6),
        "error": error.kind,
        "relative_l2_upper": None if error.kind == "exact" else error.relative_l2_upper,
        "fallback": error.fallback,
        "density": answer.density,
        "tokens": usage.tokens,
        "flops": usage.flops,
        "flops_dense": usage.flops_dense,
        "peak_bytes": usage.peak_bytes,
        "batch_requests": answer.batch_requests,
        "cost_usd": usage.cost_usd,
        "saved_usd": usage.saved_usd,
        "joules": usage.joules,
        "carbon_g": usage.carbon_g,
        "queue_s": round(timing.queue_s, 6),
        "device_s": round(timing.device_s, 6),
        "paused_s": round(timing.paused_s, 6),
        "total_s": round(timing.total_s, 6),
    }


def _unanswered(trail: RequestRecord, config: Config, hour_usd: float) -> dict[str, Field | None]:
    """What was used before it failed. Device time of a refusal is 0, and it never queued."""
    told: dict[str, Field | None] = {"total_s": round(trail.ended_s - trail.received_s, 6)}
    if trail.plan is not None and trail.planned_s is not None:
        began_s = trail.runs[0].started_s if trail.runs else trail.ended_s
        told |= {
            "plan": trail.plan.kind.value,
            "predicted_s": round(trail.plan.predicted_s, 6),
            "queue_s": 0.0 if trail.admitted_s is None else round(max(0.0, began_s - trail.planned_s), 6),
            "device_s": round(trail.device_s, 6),
            "paused_s": round(sum(run.paused_s for run in trail.runs), 6),
            "cost_usd": cost_usd(trail.device_s, hour_usd),
            "joules": trail.joules,
            "carbon_g": carbon_g(trail.joules, config.carbon_g_per_kwh),
        }
    return told
