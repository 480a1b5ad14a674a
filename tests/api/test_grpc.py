"""The gRPC methods with a fake service and context: same requests, one status for each failure, no internals."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2

from service.api import answer as answers
from service.api.codec import raw_bytes
from service.api.grpc import health as grpc_health
from service.api.grpc import messages, methods, requests
from service.api.grpc.requests import DOOR, METHODS, SERVICE, add_inference_to_server
from service.api.handler import Handler
from service.api.open_inference import http_body as oip_http
from service.api.open_inference import metadata
from service.api.open_inference import protocol as oip
from service.api.open_inference import tensors as wire
from service.api.proto import open_inference_grpc_pb2 as pb
from service.attention.output import no_checkpoint
from service.billing.tenants import Tenants, key_hash
from service.config import Config, TenantConfig
from service.core.answer import (
    Answer,
    ErrorReport,
    Timing,
    Usage,
)
from service.core.host_work import HostAsk
from service.core.model_info import ModelInfo
from service.core.plan import Cost, Plan, PlanKind
from service.core.request import AttentionRequest, ForwardRequest, Request
from service.engine.engine import Engine
from service.engine.pricing import Estimate
from service.errors import CODES, FarsightError, Kind
from service.telemetry.request_record import RequestRecord
from tests.api.common import INFO

T = TypeVar("T")

SAMPLE = torch.arange(8.0).reshape(1, 1, 2, 4)
RAW = bytes(raw_bytes(SAMPLE))


def answer(tensors: dict[str, torch.Tensor]) -> Answer:
    plan = Plan(PlanKind.DENSE, Cost(1, 2, 3, 4), 0.5, "short")
    usage = Usage(2, 3, 3, 4, 4, 0.25, 5, 1e-6, 0.0)
    return Answer("req-1", tensors, plan, ErrorReport(), usage, Timing(0.125, 0.25, 0.5))


class Service:
    """Answers value as output; `error` replaces the answer, and is counted by the engine if `counts`."""

    def __init__(self, error: Exception | None = None, *, counts: bool = False) -> None:
        self.error, self.counts = error, counts
        self.ready = self.alive = True
        self.config, self.clock, self.recorder = Config(), time.perf_counter, None
        self.tenants, self.hour_usd = Tenants(Config()), 0.1
        self.requests: list[Request] = []
        self.refusals: list[tuple[str, Kind]] = []
        self.unanswered: list[RequestRecord] = []
        self.held = 0
        self.log: list[object] = []

    async def submit(self, request: Request, record: RequestRecord | None = None) -> Answer:
        self.requests.append(request)
        self.log.append(self.held)
        if self.error:
            if self.counts and record is not None:
                record.fail(Kind.OVERLOADED)
            raise self.error
        if isinstance(request, ForwardRequest):
            return answer({"embedding": torch.zeros(len(request.texts), 3)})
        return answer({"output": request.value, "lse": torch.zeros(request.query.shape[:3])})

    async def priced(self, request: Request, record: RequestRecord | None = None) -> Estimate:
        return Estimate({}, None, "not asked", 0.0, would_admit=False)

    async def off_loop(self, record: RequestRecord, ask: HostAsk, function: Any) -> Any:
        return await asyncio.to_thread(function, no_checkpoint)

    def charge_unanswered(self, record: RequestRecord) -> None:
        self.unanswered.append(record)

    def held_bytes(self) -> Any:
        return Held(self)

    def refused(self, endpoint: str, kind: Kind) -> None:
        self.refusals.append((endpoint, kind))

    def model_infos(self) -> tuple[ModelInfo, ...]:
        return (INFO,)


class Held:
    """Counts in its service what is in flight."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def __enter__(self) -> Held:
        return self

    def take(self, size: int) -> None:
        self.service.held += size

    def __exit__(self, *_: object) -> None:
        self.service.log.append(len(self.service.requests))
        self.service.held = 0


class Context:
    """As Serve's: what was set last is sent, its own request_id is kept."""

    def __init__(self, **metadata: str) -> None:
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailing = [("request_id", "serve-1")]
        self.metadata = [(name.replace("_", "-"), value) for name, value in metadata.items()]

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing = [self.trailing[0], *trailing_metadata]

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return self.trailing

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata


class Methods(methods.GrpcMethods):
    def __init__(self, service: Any) -> None:
        self.handler = Handler(service)


def run(call: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(call)


def attention(datatype: str = "FP32", sample: torch.Tensor = SAMPLE, **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="attention", id="caller-1")
    for name in ("query", "key", "value"):
        request.inputs.add(name=name, datatype=datatype, shape=sample.shape)
        request.raw_input_contents.append(bytes(raw_bytes(sample)))
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], fields[type(value)], value)
    return request


def infer(
    request: pb.ModelInferRequest, service: Service | None = None, **metadata: str
) -> tuple[Any, Context, Service]:
    context, service = Context(**metadata), service or Service()
    return run(Methods(service).ModelInfer(request, context)), context, service


def fails(request: pb.ModelInferRequest, says: str, kind: Kind = Kind.INVALID) -> Context:
    response, context, service = infer(request)
    assert says in context.details
    assert context.code.name == CODES[kind].grpc
    assert response == pb.ModelInferResponse()
    assert service.refusals == [("infer", kind)]
    return context


# answers


def test_infer() -> None:
    service = Service()
    request = attention(is_causal=True, window="[-1, 0]", max_error=0, causal_alignment=0, scale=0.5)
    request.outputs.add(name="output").parameters["binary_data"].bool_param = True
    request.outputs.add(name="lse")
    response, context, service = infer(request, service)
    assert (context.code, service.refusals) == (grpc.StatusCode.OK, [])
    assert (response.model_name, response.model_version, response.id) == ("attention", "1", "caller-1")
    assert [(one.name, one.datatype, list(one.shape)) for one in response.outputs] == [
        ("output", "FP32", [1, 1, 2, 4]),
        ("lse", "FP32", [1, 1, 2]),
    ]
    assert list(response.raw_output_contents) == [RAW, bytes(8)]
    got = {name: value.string_param for name, value in response.parameters.items()}
    assert got == answers.headers(answer({}))
    (sent,) = service.requests
    assert isinstance(sent, AttentionRequest)
    assert sent.options.window == (-1, 0)
    assert sent.options.returns == ("output", "lse")
    assert sent.options.scale == 0.5


def test_a_block_map_is_bytes(engine: Engine) -> None:
    request = attention(is_causal=True)
    request.outputs.add(name="block_map")
    response = run(Methods(engine).ModelInfer(request, Context()))
    assert [(one.name, one.datatype, list(one.shape)) for one in response.outputs] == [
        ("block_map", "UINT8", [1, 1, 1, 1])
    ]
    assert list(response.raw_output_contents) == [b"\xff"]


def test_scores_of_a_stage_arrive_with_their_infinities(engine: Engine) -> None:
    request = attention(stage="masked", is_causal=True, scale=1.0, audit_rows=459)
    for name in ("weights", "top_weights"):
        request.outputs.add(name=name)
    request.parameters["top_k"].int64_param = 2
    response = run(Methods(engine).ModelInfer(request, Context()))
    found = {
        output.name: wire.from_raw(output.name, output.datatype, output.shape, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    assert found["weights"].tolist() == [[[[14.0, -torch.inf], [38.0, 126.0]]]]
    assert found["top_weights"].tolist() == [[[[14.0, -torch.inf], [126.0, 38.0]]]]
    assert found["top_indices"].tolist() == [[[[0, -1], [1, 0]]]]


def test_options_of_audit_and_stage_are_checked() -> None:
    service = Service()
    infer(attention(audit_rows=459), service)
    (sent,) = service.requests
    assert isinstance(sent, AttentionRequest)
    assert sent.options.audit_rows == 459
    fails(attention(audit_rows=60), "audit_rows: Input should be 59 or 459")
    fails(attention(stage="raw"), "stage: raw is a stage of weights or top_weights")


def test_both_transports_make_the_same_request() -> None:
    entries = [
        {"name": name, "shape": [1, 1, 2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
        for name in ("query", "key", "value")
    ]
    head = json.dumps({"inputs": entries}).encode()
    by_http = oip.parse_infer(oip_http.parse_http(head + RAW * 3, len(head), model="attention"), [INFO], request_id="x")
    by_grpc = oip.parse_infer(messages.parse_message(attention()), [INFO], request_id="x")
    assert isinstance(by_http, AttentionRequest)
    assert isinstance(by_grpc, AttentionRequest)
    for field in dataclasses.fields(AttentionRequest):
        one, other = getattr(by_http, field.name), getattr(by_grpc, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("datatype", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_sixteen_bit_floats_round_trip(datatype: str, dtype: torch.dtype) -> None:
    sample = torch.randn(1, 2, 5, 4).to(dtype)
    response, _, _ = infer(attention(datatype, sample))
    assert response.outputs[0].datatype == datatype
    back = wire.from_raw("output", datatype, response.outputs[0].shape, response.raw_output_contents[0])
    assert isinstance(back, torch.Tensor)
    assert torch.equal(back, sample)


def test_typed_contents() -> None:
    request = pb.ModelInferRequest(model_name="attention")
    for name in ("query", "key", "value"):
        entry = request.inputs.add(name=name, datatype="FP32", shape=SAMPLE.shape)
        entry.contents.fp32_contents.extend(SAMPLE.flatten().tolist())
    request.inputs.add(name="attn_mask", datatype="BOOL", shape=[2, 2]).contents.bool_contents.extend([True] * 4)
    response, context, _ = infer(request)
    assert context.code == grpc.StatusCode.OK
    assert response.raw_output_contents[0] == RAW


def test_texts() -> None:
    request = pb.ModelInferRequest(model_name="mini")
    request.inputs.add(name="text", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", "é".encode()])
    service = Service()
    response, _, _ = infer(request, service)
    assert isinstance(service.requests[0], ForwardRequest)
    assert service.requests[0].texts == ("a", "é")
    assert list(response.outputs[0].shape) == [2, 3]


def test_large_tensors_leave_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    for name in ("parse_message", "render_message"):
        inner = getattr(methods, name)

        def spy(*arguments: Any, inner: Any = inner) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return inner(*arguments)

        monkeypatch.setattr(methods, name, spy)
    infer(attention())
    assert threads == [True, True]
    infer(attention(sample=torch.zeros(1, 1, 32768, 4)))
    assert threads[2:] == [False, False]


def test_the_id_of_a_request() -> None:
    def id_of(request: pb.ModelInferRequest, **metadata: str) -> tuple[str, str]:
        service = Service()
        _, context, _ = infer(request, service, **metadata)
        return service.requests[0].id, dict(context.trailing)["x-request-id"]

    request = attention()
    assert id_of(request, x_request_id="mine") == ("mine", "mine")
    assert id_of(request, x_request_id="not\nmine") == ("caller-1", "caller-1")
    request.id = "x" * 129
    assert id_of(request) == ("serve-1", "serve-1")


def test_the_timeout_of_a_request() -> None:
    service = Service()
    infer(attention(timeout=5_000_000), service, x_request_timeout_seconds="1.5")
    assert isinstance(service.requests[0], AttentionRequest)
    assert service.requests[0].options.timeout_s == 1.5
    _, context, _ = infer(attention(), x_request_timeout_seconds="soon")
    assert context.details == "x-request-timeout-seconds: expected a positive number, got 'soon'"


# failures


def test_wrong_requests() -> None:
    request = attention()
    request.model_name = "bert"
    fails(request, "model 'bert' is not served; expected one of attention, mini", Kind.NOT_FOUND)
    fails(attention("FP16"), "query: FP16 [1, 1, 2, 4] takes 16 bytes, got 32")
    fails(attention(mode="fast"), "mode: Input should be")
    fails(attention(mod="fast"), "unknown parameter 'mod'")
    request = attention()
    request.parameters["mode"].SetInParent()
    fails(request, "parameter 'mode' has no value")
    request = attention()
    del request.raw_input_contents[2]
    fails(request, "expected one for each of 3 inputs, got 2")
    request = attention()
    request.inputs[0].contents.fp32_contents.append(1)
    fails(request, "query: contents and raw_input_contents exclude each other")
    request = attention()
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    fails(request, "query: unknown parameter 'shared_memory_region'")
    request = attention()
    request.outputs.add(name="output")
    request.outputs.add(name="output")
    fails(request, "output 'output' is requested twice")
    request = attention()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp64_contents.append(1)
    fails(request, "query: expected FP32 in fp32_contents, got fp64_contents")
    request.inputs[0].datatype = "BF16"
    fails(request, "query: BF16 has no form as a list of numbers")
    request.inputs[0].datatype = "UINT8"
    fails(request, "query: datatype: expected one of BOOL, INT32, INT64, FP16, BF16, FP32, FP64, BYTES, got 'UINT8'")
    fails(pb.ModelInferRequest(model_name="attention"), "input 'query' is missing")


def test_a_claim_over_the_limit_is_refused_by_size() -> None:
    request = pb.ModelInferRequest(model_name="attention")
    request.inputs.add(name="query", datatype="FP32", shape=[2**31, 2**20])
    fails(request, "9007199254740992 bytes is over the limit of 268435456 bytes", Kind.TOO_LARGE)


def test_tensor_bytes_are_held_until_the_answer_is_made() -> None:
    service = Service()
    run(Methods(service).ModelInfer(attention(), Context()))
    assert service.log == [96, 1]
    assert service.held == 0


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_failure_has_its_status(kind: Kind) -> None:
    response, context, service = infer(attention(), Service(FarsightError(kind, "because", retry_after_s=2.2)))
    assert (context.code.name, context.details) == (CODES[kind].grpc, "because")
    assert dict(context.trailing) == {"request_id": "serve-1", "x-request-id": "caller-1", "retry-after": "3"}
    assert response == pb.ModelInferResponse()
    assert service.refusals == [("infer", kind)]


def test_what_the_engine_counted_is_not_counted_again() -> None:
    error = FarsightError(Kind.OVERLOADED, "full")
    assert infer(attention(), Service(error, counts=True))[2].refusals == []


def test_a_bug_shows_the_request_id_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="farsight"):
        _, context, service = infer(attention(), Service(RuntimeError("secret")))
    assert (context.code, context.details) == (grpc.StatusCode.INTERNAL, "internal error; request id caller-1")
    assert service.refusals == [("infer", Kind.INTERNAL)]
    assert "secret" in caplog.text


def test_a_client_that_left_cancels_the_method() -> None:
    class Slow(Service):
        async def submit(self, request: Request, record: RequestRecord | None = None) -> Answer:
            await asyncio.sleep(60)
            raise AssertionError

    async def leave() -> None:
        task = asyncio.create_task(Methods(Slow()).ModelInfer(attention(), Context()))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        run(leave())


# metadata and health


def test_readiness_follows_the_engine() -> None:
    engine = Service()
    service = Methods(engine)
    for ready in (True, False):
        engine.ready = engine.alive = ready
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        assert run(service.ServerLive(pb.ServerLiveRequest(), Context())).live
        assert run(service.ServerReady(pb.ServerReadyRequest(), Context())).ready == ready
        assert run(service.ModelReady(pb.ModelReadyRequest(name="mini", version="1"), Context())).ready == ready
        for name in ("", methods.SERVICE):
            assert run(service.Check(health_pb2.HealthCheckRequest(service=name), Context())).status == status


def test_what_is_not_there_is_not_found() -> None:
    engine = Service()
    service = Methods(engine)
    for call, message in (
        (service.ModelReady, pb.ModelReadyRequest(name="x")),
        (service.ModelMetadata, pb.ModelMetadataRequest(name="mini", version="3")),
        (service.Check, health_pb2.HealthCheckRequest(service="x")),
    ):
        context = Context()
        run(call(message, context))
        assert context.code == grpc.StatusCode.NOT_FOUND
    assert engine.refusals == [(name, Kind.NOT_FOUND) for name in ("model_ready", "model_metadata", "health")]


def test_metadata_equals_the_documents() -> None:
    service = Methods(Service())
    server = run(service.ServerMetadata(pb.ServerMetadataRequest(), Context()))
    assert (server.name, list(server.extensions)) == ("farsight", ["binary_tensor_data"])
    for name in ("attention", "mini"):
        model = run(service.ModelMetadata(pb.ModelMetadataRequest(name=name), Context()))
        document = metadata.model_metadata(name, "", [INFO])
        assert (model.name, list(model.versions), model.platform) == (name, ["1"], "farsight_torch")
        for side in ("inputs", "outputs"):
            got = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(model, side)]
            assert got == document[side]


def test_health_registers_check_alone() -> None:
    added: list[grpc.GenericRpcHandler] = []

    class Server:
        def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
            added.extend(handlers)

    grpc_health.add_health_to_server(Methods(Service()), Server())
    assert added[0].service_name() == "grpc.health.v1.Health"


NOT_UTF8 = b"\x0a\x01\xff"  # field 1, a string of one byte
CALLS = (*((SERVICE, name) for name in METHODS), (grpc_health.HEALTH_SERVICE, "Check"))


async def failure(engine: Service, service_name: str, method: str, content: bytes) -> grpc.aio.AioRpcError | None:
    """Of one call over a real connection."""
    server = grpc.aio.server()
    servicer = Methods(engine)
    add_inference_to_server(servicer, server)
    grpc_health.add_health_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.unary_unary(f"/{service_name}/{method}")(content, metadata=[("x-api-key", "key")], timeout=20)
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        await server.stop(None)
    return None


@pytest.mark.parametrize(("service_name", "method"), CALLS)
@pytest.mark.parametrize("content", [NOT_UTF8, b"\x0a\x7f"], ids=["not UTF-8", "cut off"])
def test_what_cannot_be_read_is_invalid(service_name: str, method: str, content: bytes) -> None:
    """gRPC's own answer would be INTERNAL."""
    engine = Service()

    error = run(failure(engine, service_name, method, content))
    has_strings = method not in ("ServerLive", "ServerReady", "ServerMetadata")
    if content is NOT_UTF8 and not has_strings:  # an unknown field, which protobuf skips
        assert error is None
        return
    assert error is not None
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in str(error.details())
    assert [kind for _, kind in engine.refusals] == [Kind.MALFORMED]


@pytest.mark.parametrize("key", ["key", "other"])
def test_a_key_is_asked_for_before_the_message_is_received(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Service()
    engine.tenants = Tenants(Config(tenants=(TenantConfig(name="shop", key_sha256=(key_hash(key),)),)))
    read: list[int] = []

    def spied(message: Any) -> Any:
        return lambda content: read.append(len(content)) or message.FromString(content)

    monkeypatch.setattr(requests, "reader", spied)
    monkeypatch.setattr(DOOR, "refusal", Methods(engine).refusal)
    content = attention().SerializeToString()
    error = run(failure(engine, SERVICE, "ModelInfer", content))
    if key == "key":
        assert (error, read) == (None, [len(content)])
        return
    assert error is not None
    assert (error.code(), error.details(), read) == (grpc.StatusCode.UNAUTHENTICATED, "unknown API key", [])
    assert dict(error.trailing_metadata())["x-request-id"]
    assert engine.refusals == [("infer", Kind.UNAUTHENTICATED)]
