"""Trails as OpenTelemetry spans, sent by OTLP over HTTP; made when a request has ended, from what was measured.

Sending has a thread of its own and a bounded queue: a collector that hangs or is gone costs spans, never the service.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.errors import CODES

if TYPE_CHECKING:
    from service.engine.batch import Ran
    from service.telemetry.trail import Field, Trail

MAX_WAITING = 8192  # spans; about a thousand requests, 3 KB a span
SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0


class Tracing:
    """A tracer provider of our own: Ray, in the same process, has the global one."""

    def __init__(self, endpoint: str, ratio: float, clock: Callable[[], float]) -> None:
        """RuntimeError where the exporter is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise RuntimeError(
                "otlp_endpoint is set, and the package opentelemetry-exporter-otlp-proto-http is not installed: "
                "pip install 'farsight[tracing]'"
            ) from error
        self._clock = clock
        self._empty = Context()  # Ray may have a span of its own about
        self._propagator = TraceContextTextMapPropagator()
        self._exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        sender = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=SEND_EVERY_S * 1e3
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": "farsight", "service.version": version("farsight")}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(sender)
        self._tracer = self._provider.get_tracer("farsight", version("farsight"))
        # what the library says about a collector that is gone, in our form
        library, ours = logging.getLogger("opentelemetry"), logging.getLogger("farsight")
        library.handlers[:], library.propagate = ours.handlers, ours.propagate

    def tell(self, trail: Trail, record: Mapping[str, Field]) -> None:
        """A server span, its stages inside it, and inside those what paused them. Nothing is waited for."""
        # both clocks now: the times of one request fit together, whatever happens to the calendar's
        zero_ns = time.time_ns() - int(self._clock() * 1e9)
        parent = self._empty
        if trail.traceparent is not None:
            carrier = {"traceparent": trail.traceparent, "tracestate": trail.tracestate or ""}
            parent = self._propagator.extract(carrier, parent)
        start_ns = zero_ns + int(trail.received_s * 1e9)
        root = self._tracer.start_span(trail.name, parent, SpanKind.SERVER, start_time=start_ns)
        if not root.is_recording():
            return
        root.set_attributes({f"farsight.{name}": value for name, value in record.items()} | _semantic(trail))
        if trail.failure is not None:
            root.set_status(StatusCode.ERROR, trail.reason)
        self._write(stages(trail), root, zero_ns)
        root.end(zero_ns + int(trail.ended_s * 1e9))

    def _write(self, inside: Sequence[Stage], parent: Span, zero_ns: int) -> None:
        within = set_span_in_context(parent, self._empty)
        for stage in inside:
            start_ns = zero_ns + int(stage.start_s * 1e9)
            span = self._tracer.start_span(stage.name, within, attributes=stage.attributes, start_time=start_ns)
            if stage.is_failed:
                span.set_status(StatusCode.ERROR)
            if stage.inside:
                self._write(stage.inside, span, zero_ns)
            span.end(zero_ns + int(stage.end_s * 1e9))

    def close(self) -> None:
        """Send what waits; after two seconds the rest is let go."""
        # on a thread: the library would wait for half a minute
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        if closing.is_alive():
            # what it tries again, it gives up
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Stage:
    """A span to be, with those inside of it."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Field] | None = None
    is_failed: bool = False
    inside: tuple[Stage, ...] = ()


def stages(trail: Trail) -> list[Stage]:
    """What a request went through, in order; where it ended early, the last one is where."""
    found: list[Stage] = []
    at_s = trail.received_s
    marks = {
        "parse": trail.parsed_s,
        "tokenize": trail.tokenized_s,
        "plan": trail.planned_s,
        "admit": trail.admitted_s,
        "queue": trail.runs[0].started_s if trail.runs else None,
    }
    if trail.tokenized_s is None:
        del marks["tokenize"]  # attention has no tokens; inputs that are refused there end in `plan`
    for name, end_s in marks.items():
        told = None
        if name == "plan" and trail.plan is not None:
            told = {"farsight.plan": trail.plan.kind.value, "farsight.plan.reason": trail.plan.reason}
        if end_s is None:
            return [*found, Stage(name, at_s, trail.ended_s, told, is_failed=True)]
        found.append(Stage(name, at_s, end_s, told))
        at_s = end_s
    found += [_execution(run) for run in trail.runs]
    if trail.answered_s is not None:
        found.append(Stage("encode", trail.answered_s, trail.ended_s, is_failed=trail.failure is not None))
    return found


def _execution(run: Ran) -> Stage:
    """Its device time is what is left of it without the pauses."""
    told: dict[str, Field] = {
        "farsight.batch_requests": run.batch_requests,
        "farsight.device_s": run.ended_s - run.started_s - run.paused_s,  # of the whole batch
        "farsight.paused_s": run.paused_s,
    }
    pauses = tuple(Stage("paused", *pause) for pause in run.pauses)
    return Stage("execute", run.started_s, run.ended_s, told, run.is_failed, pauses)


def _semantic(trail: Trail) -> dict[str, Field]:
    """OpenTelemetry's own names for the same."""
    if trail.transport == "grpc":
        code = "OK" if trail.failure is None else CODES[trail.failure].grpc
        return {"rpc.system.name": "grpc", "rpc.method": trail.name, "rpc.response.status_code": code}
    method, _, route = trail.name.partition(" ")
    status = 200 if trail.failure is None else CODES[trail.failure].http
    return {"http.request.method": method, "http.route": route, "http.response.status_code": status}
