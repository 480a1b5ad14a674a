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

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.core.run import RunRecord
from service.errors import CODES
from service.telemetry.recorder import Field
from service.telemetry.request_record import RequestRecord

MAX_WAITING = 8192  # spans: about a thousand requests, 3 KB each
SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
UNSET, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class Tracing:
    """A pipeline of our own: Ray, in the same process, has the global one."""

    def __init__(self, endpoint: str, ratio: float, clock: Callable[[], float]) -> None:
        """RuntimeError if the exporter is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise RuntimeError(
                "otlp_endpoint is set, and the package opentelemetry-exporter-otlp-proto-http (extra `tracing`) is not "
                "installed"
            ) from error
        self._clock = clock
        self._nothing = Context()  # Ray may have a span of its own open
        self._propagator = TraceContextTextMapPropagator()
        self._ids = RandomIdGenerator()
        self._sampler = ParentBased(TraceIdRatioBased(ratio))
        self._resource = Resource.create({"service.name": "farsight", "service.version": version("farsight")})
        self._scope = InstrumentationScope("farsight", version("farsight"))
        self._exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        self._sender = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=SEND_EVERY_S * 1e3
        )
        # the library's messages about a collector that is gone, in our format
        library, ours = logging.getLogger("opentelemetry"), logging.getLogger("farsight")
        library.handlers[:], library.propagate = ours.handlers, ours.propagate

    def sampled(self, record: RequestRecord) -> TracePlace | None:
        """Where the spans of a request belong: its caller's trace, or a new one. None: it is not sampled."""
        within, parent = self._nothing, None
        if record.received.traceparent is not None:
            carrier = {"traceparent": record.received.traceparent, "tracestate": record.received.tracestate or ""}
            within = self._propagator.extract(carrier, within)
            parent = get_current_span(within).get_span_context()
        if parent is None or not parent.is_valid:
            parent, trace_id = None, self._ids.generate_trace_id()
        else:
            trace_id = parent.trace_id
        result = self._sampler.should_sample(within, trace_id, record.received.name, SpanKind.SERVER)
        is_sampled = result.decision is Decision.RECORD_AND_SAMPLE
        return TracePlace(trace_id, parent, result.trace_state) if is_sampled else None

    def write(self, record: RequestRecord, fields: Mapping[str, Field], place: TracePlace) -> None:
        """A server span, its stages inside it, and inside those what paused them. Returns at once."""
        # both clocks now: the times of one request fit together, whatever happens to the calendar's
        zero_ns = time.time_ns() - int(self._clock() * 1e9)
        attributes = {f"farsight.{name}": value for name, value in fields.items()} | _semantic(record)
        failure = None if record.failed is None else Status(StatusCode.ERROR, record.failed.reason)
        received = record.received
        root = SpanNode(received.name, received.received_s, record.ended_s, attributes, failure, stages(record))
        self._write(root, place, place.parent, zero_ns, SpanKind.SERVER)

    def _write(
        self,
        node: SpanNode,
        place: TracePlace,
        parent: SpanContext | None,
        zero_ns: int,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        context = SpanContext(
            place.trace_id, self._ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED), place.trace_state
        )
        # made as it ended: one that is started first costs four times as much and says no more
        span = ReadableSpan(
            node.name,
            context,
            parent,
            self._resource,
            node.attributes,
            kind=kind,
            status=node.failure or UNSET,
            start_time=zero_ns + int(node.start_s * 1e9),
            end_time=zero_ns + int(node.end_s * 1e9),
            instrumentation_scope=self._scope,
        )
        self._sender.on_end(span)
        for inner in node.inside:
            self._write(inner, place, context, zero_ns)

    def close(self) -> None:
        """Send what waits; after two seconds the rest is dropped."""
        # on a thread: the library would wait for half a minute
        closing = threading.Thread(target=self._sender.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        if closing.is_alive():
            # stops its retries
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class TracePlace:
    """Where the spans of one request belong."""

    trace_id: int
    parent: SpanContext | None
    trace_state: TraceState | None


@dataclass(frozen=True, slots=True)
class SpanNode:
    """A span to be written, with those inside it."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Field] | None = None
    failure: Status | None = None
    inside: Sequence[SpanNode] = ()


def stages(record: RequestRecord) -> list[SpanNode]:
    """The stages of a request, in order; if it ended early, the last one is where."""
    found: list[SpanNode] = []
    at_s = record.received.received_s
    marks = {
        "parse": None if record.parsed is None else record.parsed.parsed_s,
        "tokenize": record.tokenized_s,
        "plan": None if record.planned is None else record.planned.planned_s,
        "admit": record.admitted_s,
        "queue": record.runs[0].started_s if record.runs else None,
    }
    if record.tokenized_s is None:
        del marks["tokenize"]  # attention has no tokens; inputs that are refused there end in `plan`
    for name, end_s in marks.items():
        attributes = None
        if name == "plan" and record.planned is not None:
            plan = record.planned.plan
            attributes = {"farsight.plan": plan.kind.value, "farsight.plan.reason": plan.reason}
        if end_s is None:
            return [*found, SpanNode(name, at_s, record.ended_s, attributes, FAILED)]
        found.append(SpanNode(name, at_s, end_s, attributes))
        at_s = end_s
    found += [_execution(run) for run in record.runs]
    if record.answered is not None:
        failure = FAILED if record.failed else None
        found.append(SpanNode("encode", record.answered.answered_s, record.ended_s, failure=failure))
    return found


def _execution(run: RunRecord) -> SpanNode:
    """Its device time is the whole batch's, without the pauses."""
    attributes: dict[str, Field] = {
        "farsight.batch_requests": run.batch_requests,
        "farsight.device_s": run.ended_s - run.started_s - run.paused_s,
        "farsight.paused_s": run.paused_s,
    }
    pauses = tuple(SpanNode("paused", *pause) for pause in run.pauses)
    return SpanNode("execute", run.started_s, run.ended_s, attributes, FAILED if run.is_failed else None, pauses)


def _semantic(record: RequestRecord) -> dict[str, Field]:
    """The same in OpenTelemetry's own names."""
    received, failed = record.received, record.failed
    if received.transport == "grpc":
        code = "OK" if failed is None else CODES[failed.kind].grpc
        return {"rpc.system.name": "grpc", "rpc.method": received.name, "rpc.response.status_code": code}
    method, _, route = received.name.partition(" ")
    status = 200 if failed is None else CODES[failed.kind].http
    return {"http.request.method": method, "http.route": route, "http.response.status_code": status}
