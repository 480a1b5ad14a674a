"""Spans as a collector gets them: real requests over both transports, real OTLP over HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.api.http.app import create_app
from service.api.proto import open_inference_grpc_pb2 as pb
from service.config import Config
from service.engine.engine import Engine
from service.engine.replica import recorder_for
from service.engine.workloads.attention import AttentionWorkload
from service.telemetry import tracing
from service.telemetry.request_record import Received, RequestRecord
from tests.api import test_grpc as grpc
from tests.engines import until_started
from tests.telemetry.followed import SMALL, Grpc, ask, engine_like, leave_while_it_runs, long_body, post

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
STAGES = ["parse", "plan", "admit", "queue", "execute", "encode"]


class Collector:
    """Keeps what it is sent; one that is held does not answer until it is let go."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.asked, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()

    def take(self, body: bytes) -> None:
        self.asked.set()
        self.let_go.wait()
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({pair.key: pair.value.string_value for pair in one.resource.attributes})
            self.spans += [span for scope in one.scope_spans for span in scope.spans]

    @property
    def root(self) -> Span:
        (root,) = (span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER)
        return root

    def inside(self, parent: Span) -> list[Span]:
        """In the order of their starts."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector = Collector(server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@contextmanager
def traced(engine: Engine, collector: Collector, **changes: Any) -> Iterator[Engine]:
    """Its spans are with the collector when it has been left."""
    with engine_like(engine, otlp_endpoint=collector.url, **changes) as other:
        yield other


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


def ids(span: Span) -> tuple[str, str]:
    return span.trace_id.hex(), span.parent_span_id.hex()


def assert_nested(collector: Collector, parent: Span) -> None:
    """Children lie inside their parent, one after another."""
    at = parent.start_time_unix_nano
    for child in collector.inside(parent):
        assert at <= child.start_time_unix_nano <= child.end_time_unix_nano <= parent.end_time_unix_nano
        assert child.trace_id == parent.trace_id
        at = child.end_time_unix_nano


def test_a_request_over_http_is_a_span_with_its_stages_and_its_usage(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        response = post(other, "/v1/attention", traceparent=SAMPLED, tracestate="vendor=1", x_request_id="mine")
    root, told, body = collector.root, attributes(collector.root), response.json()
    assert root.name == "POST /v1/attention"
    assert (*ids(root), root.trace_state) == (TRACE, PARENT, "vendor=1")
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert [span.name for span in collector.inside(root)] == STAGES
    assert_nested(collector, root)
    usage = body["usage"]
    assert {name: told[f"farsight.{name}"] for name in ("tokens", "flops", "flops_dense", "peak_bytes")} == {
        name: usage[name] for name in ("tokens", "flops", "flops_dense", "peak_bytes")
    }
    assert told["farsight.cost_usd"] == body["cost"]["usd"]
    assert told["farsight.device_s"] == pytest.approx(usage["device_s"], abs=1e-6)
    assert (told["farsight.plan"], told["farsight.request_id"]) == (body["plan"]["kind"], "mine")
    assert (told["http.response.status_code"], told["http.route"]) == (200, "/v1/attention")
    execute = collector.inside(root)[4]
    assert (execute.end_time_unix_nano - execute.start_time_unix_nano) / 1e9 == pytest.approx(
        usage["device_s"], abs=1e-3
    )
    assert collector.resources[0]["service.name"] == "farsight"
    assert "123.5" not in str(collector.spans)  # what was asked is in none of them


def test_a_request_over_grpc_is_the_same(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        context = grpc.Context(traceparent=SAMPLED)
        response = asyncio.run(Grpc(other).ModelInfer(grpc.attention(), context))
    root, told = collector.root, attributes(collector.root)
    assert root.name == "inference.GRPCInferenceService/ModelInfer"
    assert ids(root) == (TRACE, PARENT)
    assert [span.name for span in collector.inside(root)] == STAGES
    assert_nested(collector, root)
    assert str(told["farsight.flops"]) == response.parameters["x-compute-flops"].string_param
    assert (told["rpc.system.name"], told["rpc.response.status_code"]) == ("grpc", "OK")


def test_a_refusal_over_grpc_has_its_status(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        asyncio.run(Grpc(other).ModelInfer(grpc.attention(mode="fast"), grpc.Context()))
    root, told = collector.root, attributes(collector.root)
    assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, "invalid")
    assert (told["rpc.response.status_code"], told["farsight.kind"]) == ("INVALID_ARGUMENT", "invalid")


def test_texts_are_tokenized_before_they_are_planned(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        response = post(other, "/v1/embeddings", {"model": "all-MiniLM-L6-v2", "input": ["a secret text", "another"]})
    assert response.status_code == 200
    root = collector.root
    assert [span.name for span in collector.inside(root)] == ["parse", "tokenize", *STAGES[1:]]
    assert attributes(root)["farsight.tokens"] == response.json()["usage"]["prompt_tokens"]
    assert root.parent_span_id == b""
    assert "secret" not in str(collector.spans)


def test_pauses_are_seen_inside_the_execution(engine: Engine, collector: Collector) -> None:
    async def beside(other: Engine) -> Any:
        app = create_app(other)
        long = asyncio.create_task(ask(app, "/v1/attention", long_body(8192), x_request_id="long"))
        await until_started(other)
        await ask(app, "/v1/attention", traceparent=UNSAMPLED)
        return (await long).json()

    with traced(engine, collector, batch_budget_s=0.01) as other:
        timing = asyncio.run(beside(other))["timing"]
    execute = collector.inside(collector.root)[4]
    pauses = collector.inside(execute)
    assert {span.name for span in pauses} == {"paused"}
    assert_nested(collector, execute)
    paused_s = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in pauses) / 1e9
    assert paused_s == pytest.approx(timing["paused_s"], abs=1e-5)
    assert paused_s > 0
    assert attributes(execute)["farsight.device_s"] == pytest.approx(timing["device_s"], abs=1e-3)


def test_every_failed_run_is_seen(engine: Engine, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AttentionWorkload._attend

    def greedy(self: AttentionWorkload, work: Any, request: Any, checkpoint: Any) -> Any:
        if work.plan.kind != "chunked":
            raise MemoryError
        return original(self, work, request, checkpoint)

    monkeypatch.setattr(AttentionWorkload, "_attend", greedy)
    with traced(engine, collector) as other:
        assert post(other, "/v1/attention", {**SMALL, "mode": "dense"}).status_code == 200
    stages = collector.inside(collector.root)
    assert [span.name for span in stages] == [*STAGES[:4], "execute", "execute", "encode"]
    assert [span.status.code for span in stages[4:6]] == [Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET]


@pytest.mark.parametrize(
    ("body", "last", "code", "reason"),
    [
        ({**SMALL, "mode": "fast"}, "parse", 422, "invalid"),
        ({**SMALL, "returns": ["weights"], "rows": [5]}, "parse", 422, "invalid"),
        ({**long_body(2048), "timeout_s": 1e-6}, "admit", 504, "predicted_late"),
    ],
)
def test_a_refusal_ends_where_it_was_refused(
    engine: Engine, collector: Collector, body: Any, last: str, code: int, reason: str
) -> None:
    with traced(engine, collector) as other:
        assert post(other, "/v1/attention", body).status_code == code
    root = collector.root
    stages = collector.inside(root)
    assert [span.name for span in stages] == [*STAGES[: STAGES.index(last) + 1]]
    assert [span.status.code for span in stages] == [*[Status.STATUS_CODE_UNSET] * (len(stages) - 1), 2]
    assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, reason)
    assert attributes(root)["http.response.status_code"] == code


def test_a_caller_who_left_is_an_error_with_what_was_used(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        asyncio.run(leave_while_it_runs(other))
    root = collector.root
    assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, "cancelled")
    execute = collector.inside(root)[-1]
    assert (execute.name, execute.status.code) == ("execute", Status.STATUS_CODE_ERROR)
    assert attributes(root)["farsight.device_s"] > 0


@pytest.mark.parametrize(
    ("ratio", "traceparent", "parent"),
    [
        (1.0, None, ""),
        (1.0, UNSAMPLED, None),
        (1.0, "00-nonsense-01", ""),
        (0.0, None, None),
        (0.0, SAMPLED, PARENT),
    ],
)
def test_the_caller_decides_else_the_ratio(
    engine: Engine, collector: Collector, ratio: float, traceparent: str | None, parent: str | None
) -> None:
    with traced(engine, collector, trace_ratio=ratio) as other:
        post(other, "/v1/attention", **({} if traceparent is None else {"traceparent": traceparent}))
    roots = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert [span.parent_span_id.hex() for span in roots] == ([] if parent is None else [parent])


def test_probes_are_not_followed(engine: Engine, collector: Collector) -> None:
    with traced(engine, collector) as other:
        methods = Grpc(other)
        asyncio.run(methods.ModelReady(pb.ModelReadyRequest(name="attention"), grpc.Context()))
        assert post(other, "/nowhere").status_code == 404
    assert [span.name for span in collector.spans] == ["POST", "parse"]


# -- the collector's troubles ---------------------------------------------------------------------------------------


def refused(number: int) -> RequestRecord:
    """Of a request that was refused at once."""
    return RequestRecord(Received(f"r{number}", "http", "attention", "POST /v1/attention", float(number)))


def test_a_collector_that_hangs_costs_spans_and_nothing_else(
    engine: Engine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_WAITING", 512)
    collector.let_go.clear()
    with traced(engine, collector) as other:
        recorder = other.recorder
        assert recorder is not None
        assert recorder._spans is not None
        for number in range(256):  # two spans each: a batch
            with recorder.follow(refused(number)):
                pass
        assert collector.asked.wait(10)  # it has them, and does not answer
        for number in range(2000):
            with recorder.follow(refused(number)):
                pass
        assert post(other, "/v1/attention").status_code == 200
        assert collector.spans == []
        collector.let_go.set()
        assert recorder._spans._sender.force_flush()
        assert 512 <= len(collector.spans) <= 1024  # of over 4,500


def test_a_service_that_stops_does_not_wait_for_a_collector_that_hangs(
    engine: Engine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.05)
    collector.let_go.clear()
    with traced(engine, collector) as other:
        assert post(other, "/v1/attention").status_code == 200
    assert collector.spans == []


def test_a_collector_that_is_not_there_is_not_missed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.05)
    with collecting() as gone:
        pass
    with traced(engine, gone) as other:
        assert [post(other, "/v1/attention").status_code for _ in range(5)] == [200] * 5


def test_without_the_exporter_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = Config(otlp_endpoint="http://127.0.0.1:4318/v1/traces")
    with pytest.raises(RuntimeError, match=r"exporter-otlp-proto-http \(extra `tracing`\)"):
        recorder_for(config, lambda: 0.0, 0.1)


def test_rays_own_provider_stays_the_global_one(engine: Engine, collector: Collector) -> None:
    before = trace.get_tracer_provider()
    with traced(engine, collector):
        assert trace.get_tracer_provider() is before


def test_nothing_is_imported_or_kept_while_it_is_off(engine: Engine) -> None:
    assert engine.recorder is None
    code = (
        "import sys, service.engine.engine, service.api.http.endpoint, service.api.grpc.methods\n"
        "from service.engine.replica import recorder_for\n"
        "from service.config import Config\n"
        "assert recorder_for(Config(), lambda: 0.0, 0.1) is None\n"
        "recorder_for(Config(request_log=True), lambda: 0.0, 0.1)\n"
        "kept_out = 'opentelemetry.exporter.otlp', 'service.telemetry.tracing'\n"
        "print([name for name in sys.modules if name.startswith(kept_out)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
