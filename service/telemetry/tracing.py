"""Request records as OpenTelemetry spans, sent by OTLP over HTTP; made when a request has ended.

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
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.errors import CODES

if TYPE_CHECKING:
    from service.engine.runner import RunRecord
    from service.telemetry.request_record import Field, RequestRecord

MAX_WAITING = 8192  # spans; about a thousand requests, 3 KB a span
SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
UNSET, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class Tracing:
    """A pipeline of our own: Ray, in the same process, has the global one."""

    def __init__(self, endpoint: str, ratio: float, clock: Callable[[], float]) -> None:
        """RuntimeError where the exporter is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise RuntimeError(
                "otlp_endpoint is set, and the package opentelemetry-exporter-otlp-proto-http (extra `tracing`) is not "
                "installed"
            ) from error
        self._clock = clock
        self._nothing = Context()  # Ray may have a span of its own about
        self._propagator = TraceContextTextMapPropagator()
        self._ids = RandomIdGenerator()
        self._sampler = ParentBased(TraceIdRatioBased(ratio))
        self._resource = Resource.create({"service.name": "farsight", "service.version": version("farsight")})
        self._scope = InstrumentationScope("farsight", version("farsight"))
        self._exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        self._sender = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=SEND_EVERY_S * 1e3
        )
        # what the library says about a collector that is gone, in our form
        library, ours = logging.getLogger("opentelemetry"), logging.getLogger("farsight")
        library.handlers[:], library.propagate = ours.handlers, ours.propagate

    def sampled(self, trail: RequestRecord) -> Traced | None:
        """Where the spans of a request belong: its caller's trace, or a new one. None: not wanted."""
        within, parent = self._nothing, None
        if trail.traceparent is not None:
            carrier = {"traceparent": trail.traceparent, "tracestate": trail.tracestate or ""}
            within = self._propagator.extract(carrier, within)
            parent = get_current_span(within).get_span_context()
        if parent is None or not parent.is_valid:
            parent, trace_id = None, self._ids.generate_trace_id()
        else:
            trace_id = parent.trace_id
        result = self._sampler.should_sample(within, trace_id, trail.name, SpanKind.SERVER)
        return Traced(trace_id, parent, result.trace_state) if result.decision is Decision.RECORD_AND_SAMPLE else None

    def tell(self, trail: RequestRecord, record: Mapping[str, Field], traced: Traced) -> None:
        """A server span, its stages inside it, and inside those what paused them. Nothing is waited for."""
        # both clocks now: the times of one request fit together, whatever happens to the calendar's
        zero_ns = time.time_ns() - int(self._clock() * 1e9)
        attributes = {f"farsight.{name}": value for name, value in record.items()} | _semantic(trail)
        failure = None if trail.failure is None else Status(StatusCode.ERROR, trail.reason)
        request = SpanNode(trail.name, trail.received_s, trail.ended_s, attributes, failure, stages(trail))
        self._write(request, traced, traced.parent, zero_ns, SpanKind.SERVER)

    def _write(
        self,
        stage: SpanNode,
        traced: Traced,
        parent: SpanContext | None,
        zero_ns: int,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        context = SpanContext(
            traced.trace_id, self._ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED), traced.trace_state
        )
        # made as it ended: one that is started first costs four times as much, and is not told more
        span = ReadableSpan(
            stage.name,
            context,
            parent,
            self._resource,
            stage.attributes,
            kind=kind,
            status=stage.failure or UNSET,
            start_time=zero_ns + int(stage.start_s * 1e9),
            end_time=zero_ns + int(stage.end_s * 1e9),
            instrumentation_scope=self._scope,
        )
        self._sender.on_end(span)
        for inner in stage.inside:
            self._write(inner, traced, context, zero_ns)

    def close(self) -> None:
        """Send what waits; after two seconds the rest is let go."""
        # on a thread: the library would wait for half a minute
        closing = threading.Thread(target=self._sender.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        if closing.is_alive():
            # what it tries again, it gives up
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Traced:
    """Where spans belong."""

    trace_id: int
    parent: SpanContext | None
    trace_state: TraceState | None


@dataclass(frozen=True, slots=True)
class SpanNode:
    """A span to be, with those inside of it."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Field] | None = None
    failure: Status | None = None
    inside: Sequence[SpanNode] = ()


def stages(trail: RequestRecord) -> list[SpanNode]:
    """What a request went through, in order; where it ended early, the last one is where."""
    found: list[SpanNode] = []
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
            return [*found, SpanNode(name, at_s, trail.ended_s, told, FAILED)]
        found.append(SpanNode(name, at_s, end_s, told))
        at_s = end_s
    found += [_execution(run) for run in trail.runs]
    if trail.answered_s is not None:
        found.append(SpanNode("encode", trail.answered_s, trail.ended_s, failure=FAILED if trail.failure else None))
    return found


def _execution(run: RunRecord) -> SpanNode:
    """Its device time is what is left of it without the pauses."""
    told: dict[str, Field] = {
        "farsight.batch_requests": run.batch_requests,
        "farsight.device_s": run.ended_s - run.started_s - run.paused_s,  # of the whole batch
        "farsight.paused_s": run.paused_s,
    }
    pauses = tuple(SpanNode("paused", *pause) for pause in run.pauses)
    return SpanNode("execute", run.started_s, run.ended_s, told, FAILED if run.is_failed else None, pauses)


def _semantic(trail: RequestRecord) -> dict[str, Field]:
    """OpenTelemetry's own names for the same."""
    if trail.transport == "grpc":
        code = "OK" if trail.failure is None else CODES[trail.failure].grpc
        return {"rpc.system.name": "grpc", "rpc.method": trail.name, "rpc.response.status_code": code}
    method, _, route = trail.name.partition(" ")
    status = 200 if trail.failure is None else CODES[trail.failure].http
    return {"http.request.method": method, "http.route": route, "http.response.status_code": status}
