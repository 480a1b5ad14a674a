"""Reports each followed request once, as a log line and as spans, when both its transport and the device are done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from service.config import Config
from service.core.answer import Answer, cost_usd
from service.core.run import RunStats
from service.errors import CODES, Kind
from service.telemetry.energy import carbon_g
from service.telemetry.request_record import RequestRecord

logger = logging.getLogger("farsight")

Field = str | int | float | bool


class SpanWriter(Protocol):
    """`service.telemetry.tracing.Tracing`, if traces are wanted."""

    def sampled(self, record: RequestRecord) -> Any | None:
        """Where the spans of a request belong (with a `trace_id`); None: it is not sampled."""
        ...

    def write(self, record: RequestRecord, fields: Mapping[str, Field], place: Any) -> None:
        """Send the spans of a sampled request; returns at once."""
        ...

    def close(self) -> None: ...


class RequestRecorder:
    """Follows requests and reports each once."""

    def __init__(self, config: Config, clock: Callable[[], float], hour_usd: float, spans: SpanWriter | None) -> None:
        self._config, self._clock, self._hour_usd, self._spans = config, clock, hour_usd, spans
        self._open: set[RequestRecord] = set()  # the caller has its answer, and the device still works for it
        self._is_closed = False  # the device reports nothing more

    @property
    def open(self) -> int:
        """Requests whose caller has been answered or has left, and which the device still works for."""
        return len(self._open)

    @contextmanager
    def follow(self, record: RequestRecord) -> Iterator[RequestRecord]:
        """Around everything that answers a request, up to the last byte of its body; sending is not included."""
        try:
            yield record
        except asyncio.CancelledError:
            record.fail(Kind.CANCELLED)
            raise
        finally:
            record.ended_s = self._clock()
            if record.is_running:
                self._open.add(record)
            else:
                self._report(record)
            if self._is_closed:
                self.abandon()

    def ran(self, record: RequestRecord, stats: RunStats) -> None:
        """The device is done with this request."""
        record.is_running, record.stats = False, stats
        if record in self._open:
            self._open.remove(record)
            self._report(record)

    def abandon(self) -> None:
        """The device has ended: report what is still open without its result."""
        self._is_closed = True
        while self._open:
            self._report(self._open.pop())

    def close(self) -> None:
        """Report the rest and send what waits, within a short time."""
        self.abandon()
        if self._spans is not None:
            self._spans.close()

    def fields(self, record: RequestRecord) -> dict[str, Field]:
        """The usage record of a request, answered or not: its log line, and the attributes of its span."""
        received, parsed, failed = record.received, record.parsed, record.failed
        found: dict[str, Field | None] = {
            "request_id": received.id,
            "transport": received.transport,
            "endpoint": received.endpoint,
            "code": 200 if failed is None else CODES[failed.kind].http,
            "kind": None if failed is None else failed.kind.value,
            "reason": None if failed is None else failed.reason,
            "tenant": None if parsed is None else parsed.tenant,
            "model": None if parsed is None else parsed.model,
        }
        found |= self._unanswered(record) if record.answered is None else _answered(record.answered.answer)
        return {name: value for name, value in found.items() if value is not None}

    def _report(self, record: RequestRecord) -> None:
        place = None if self._spans is None else self._spans.sampled(record)
        if place is None and not self._config.request_log:
            return
        fields = self.fields(record)
        if self._config.request_log:
            trace = {} if place is None else {"trace_id": f"{place.trace_id:032x}"}
            logger.info(record.message, extra={"fields": fields | trace})
        if self._spans is not None and place is not None:
            self._spans.write(record, fields, place)

    def _unanswered(self, record: RequestRecord) -> dict[str, Field | None]:
        """What was used before it failed. A refusal used no device time and never queued."""
        host = record.host
        found: dict[str, Field | None] = {
            "total_s": round(record.ended_s - record.received.received_s, 6),
            "host_s": None if host is None else round(host.seconds, 6),
            "cost_usd": None if host is None else host.usd,
        }
        planned, stats = record.planned, record.stats
        if planned is None:
            return found
        began_s = stats.runs[0].started_s if stats else record.ended_s
        device_s, joules = (stats.device_s, stats.joules) if stats else (0.0, None)
        return found | {
            "plan": planned.plan.kind.value,
            "predicted_s": round(planned.plan.predicted_s, 6),
            "queue_s": 0.0 if record.admitted_s is None else round(max(0.0, began_s - planned.planned_s), 6),
            "device_s": round(device_s, 6),
            "paused_s": round(sum(run.paused_s for run in record.runs), 6),
            "cost_usd": cost_usd(device_s, self._hour_usd) + (0.0 if host is None else host.usd),
            "joules": joules,
            "carbon_g": carbon_g(joules, self._config.carbon_g_per_kwh),
        }


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
        "host_s": round(usage.host_s, 6),
        "cost_usd": usage.cost_usd,
        "saved_usd": usage.saved_usd,
        "joules": usage.joules,
        "carbon_g": usage.carbon_g,
        "queue_s": round(timing.queue_s, 6),
        "device_s": round(timing.device_s, 6),
        "paused_s": round(timing.paused_s, 6),
        "total_s": round(timing.total_s, 6),
    }
