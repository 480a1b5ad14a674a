"""gRPC methods of the Serve ingress class: the Open Inference Protocol and grpc.health.v1. Parse, call, format.

Serve calls a method by the name of its RPC with the message and its own context. A method that raises loses the
trailing metadata and puts a traceback into Serve's log, so a failure is an empty message with the code set: the
client sees the same status either way.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from service.api.answer import estimate_document, headers
from service.api.codec import dump_json
from service.api.open_inference import metadata, tensors
from service.api.open_inference import protocol as oip
from service.api.proto import open_inference_grpc_pb2 as pb
from service.api.service import INLINE_BYTES, REQUEST_ID, InferenceService
from service.billing.tenants import key_of
from service.config import TenantConfig
from service.core.answer import Answer
from service.core.request import Request
from service.errors import CODES, FarsightError, Kind, invalid, retry_after, too_large
from service.telemetry.logging import about
from service.telemetry.request_record import RequestRecord, RequestRecorder, failed

logger = logging.getLogger("farsight")

SERVICE = "inference.GRPCInferenceService"

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

Message = TypeVar("Message")


class Context(Protocol):
    """What is used of ray.serve.grpc_util.RayServegRPCContext."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...


class GrpcMethods:
    """Mixed into the ingress class, which has a `door`."""

    door: InferenceService
    max_request_bytes: int = 256 * 1024 * 1024
    trails: RequestRecorder | None = None  # where requests are followed

    def on_refused(self, endpoint: str, kind: Kind) -> None:
        """Called for a request that failed before or outside of `door.submit`, which counts its own."""

    def hold(self, size: int, held: ExitStack) -> None:
        """Counts the tensor bytes of a request until `held` is closed; may refuse by raising."""

    async def ServerLive(self, request: pb.ServerLiveRequest, grpc_context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, grpc_context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.door.ready)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, grpc_context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**metadata.server_metadata())

    async def ModelReady(self, request: pb.ModelReadyRequest, grpc_context: Context) -> pb.ModelReadyResponse:
        async def ready(_: str) -> pb.ModelReadyResponse:
            self._caller(grpc_context)
            metadata.find_model(request.name, request.version, self.door.model_infos())
            return pb.ModelReadyResponse(ready=self.door.alive)

        return await self._answered("model_ready", grpc_context, ready, pb.ModelReadyResponse())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, grpc_context: Context) -> pb.ModelMetadataResponse:
        async def described(_: str) -> pb.ModelMetadataResponse:
            self._caller(grpc_context)
            document = metadata.model_metadata(request.name, request.version, self.door.model_infos())
            return pb.ModelMetadataResponse(**document)

        return await self._answered("model_metadata", grpc_context, described, pb.ModelMetadataResponse())

    async def ModelInfer(self, request: pb.ModelInferRequest, grpc_context: Context) -> pb.ModelInferResponse:
        received_s = time.perf_counter()

        async def infer(request_id: str) -> pb.ModelInferResponse:
            tenant, is_dry_run = self._caller(grpc_context), dry_run(grpc_context)
            timeout_s = transport_timeout_s(grpc_context)
            size = self._size(request)

            def parse() -> tuple[oip.Infer, Request]:
                neutral = parse_message(request)
                infos = self.door.model_infos()
                parsed = oip.parse_infer(neutral, infos, request_id=request_id, timeout_s=timeout_s, tenant=tenant.name)
                return neutral, parsed

            with ExitStack() as held:
                self.hold(size, held)
                neutral, parsed = await asyncio.to_thread(parse) if size > INLINE_BYTES else parse()
                if is_dry_run:
                    estimate = estimate_document(await self.door.priced(parsed), self.door.hour_usd)
                    response = pb.ModelInferResponse(model_name=neutral.model, id=neutral.id)
                    response.parameters["estimate"].string_param = dump_json(estimate).decode()
                    return response
                answer = await self.door.submit(parsed, received_s)
                if sum(tensor.nbytes for tensor in answer.tensors.values()) > INLINE_BYTES:
                    return await asyncio.to_thread(render_message, answer, parsed, neutral)
                return render_message(answer, parsed, neutral)

        return await self._answered("infer", grpc_context, infer, pb.ModelInferResponse(), suggested_id=request.id)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Context
    ) -> health_pb2.HealthCheckResponse:
        async def check(_: str) -> health_pb2.HealthCheckResponse:
            if request.service not in ("", SERVICE):
                raise FarsightError(Kind.NOT_FOUND, f"service {request.service[:96]!r} is unknown")
            status = health_pb2.HealthCheckResponse
            return status(status=status.SERVING if self.door.ready else status.NOT_SERVING)

        return await self._answered("health", grpc_context, check, health_pb2.HealthCheckResponse())

    def _caller(self, context: Context) -> TenantConfig:
        """Whose key is in the metadata; 401 where it is nobody's. Health and server metadata take none."""
        given = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        return self.door.tenants.of(key_of(given))

    def _size(self, request: pb.ModelInferRequest) -> int:
        """Bytes of the inputs, by their shapes and by what is really there, whichever is more.

        ByteSize would copy the message to learn the same.
        """
        claimed = sum(tensors.claimed_bytes(one.name, one.datatype, one.shape) for one in request.inputs)
        typed = sum(
            8 * len(getattr(one.contents, field)) for one in request.inputs for field in set(_CONTENTS.values())
        )
        raw = sum(len(one) for one in request.raw_input_contents)
        size = max(claimed, typed, raw)
        if size > self.max_request_bytes:
            raise too_large("request tensors", size, self.max_request_bytes, "bytes", param="inputs")
        return size

    async def _answered(
        self,
        endpoint: str,
        context: Context,
        call: Callable[[str], Awaitable[Message]],
        empty: Message,
        *,
        suggested_id: str = "",
    ) -> Message:
        """The message of `call(request_id)`, or `empty` with the status of what it raised."""
        request_id = request_id_of(context, suggested_id)
        context.set_trailing_metadata([("x-request-id", request_id)])
        if self.trails is None or endpoint != "infer":  # the others are asked every few seconds, and use nothing
            return await self._settled(endpoint, context, call, empty, request_id)
        metadata = context.invocation_metadata()
        parent, state = _value(metadata, "traceparent"), _value(metadata, "tracestate")
        trail = RequestRecord(request_id, "grpc", endpoint, f"{SERVICE}/ModelInfer", time.perf_counter(), parent, state)
        with self.trails.follow(trail):
            return await self._settled(endpoint, context, call, empty, request_id)

    async def _settled(
        self,
        endpoint: str,
        context: Context,
        call: Callable[[str], Awaitable[Message]],
        empty: Message,
        request_id: str,
    ) -> Message:
        try:
            return await call(request_id)
        except FarsightError as error:
            failure = error
        except Exception as error:  # a bug: the caller gets the id, the log gets the rest
            logger.error("request %s failed", request_id, exc_info=error, extra=about(request_id))
            failure = FarsightError(Kind.INTERNAL, f"internal error; request id {request_id}")
        failed(failure.kind, failure.code)
        if not failure.counted:
            self.on_refused(endpoint, failure.kind)
        context.set_code(status_code(failure.kind))
        context.set_details(failure.message)
        if failure.retry_after_s is not None:
            after = retry_after(failure.retry_after_s)
            context.set_trailing_metadata([("x-request-id", request_id), ("retry-after", after)])
        return empty


def status_code(kind: Kind) -> grpc.StatusCode:
    return grpc.StatusCode[CODES[kind].grpc]


def request_id_of(context: Context, suggested: str) -> str:
    """Metadata x-request-id, or the id in the message, or Serve's own (its logs have it), or a new one."""
    given = _value(context.invocation_metadata(), "x-request-id")
    for candidate in (given, suggested, _value(context.trailing_metadata(), "request_id")):
        if candidate and REQUEST_ID.fullmatch(candidate):
            return candidate
    return uuid.uuid4().hex


def transport_timeout_s(context: Context) -> float | None:
    """Metadata x-request-timeout-seconds. Serve does not pass the deadline of the call on; it cancels at it."""
    text = _value(context.invocation_metadata(), "x-request-timeout-seconds")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid(f"x-request-timeout-seconds: {text[:32]!r} is not a positive number", param="timeout_s")
    return seconds


def dry_run(context: Context) -> bool:
    """Metadata x-dry-run: the parameter `estimate` of the answer is the price as JSON, and nothing runs."""
    text = (_value(context.invocation_metadata(), "x-dry-run") or "false").lower()
    if text not in ("true", "false"):
        raise invalid(f"x-dry-run: expected true or false, got {text[:32]!r}")
    return text == "true"


def _value(metadata: Sequence[tuple[str, str | bytes]], name: str) -> str | None:
    return next((value for key, value in metadata if key == name and isinstance(value, str)), None)


def parse_message(request: pb.ModelInferRequest) -> oip.Infer:
    """Inputs from raw contents, one for each input, or else from the typed contents of every input."""
    raw = list(request.raw_input_contents)  # each access copies, so once
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            f"raw_input_contents: expected one for each of {len(request.inputs)} inputs, got {len(raw)}", param="inputs"
        )
    inputs = []
    for index, entry in enumerate(request.inputs):
        shape = tuple(entry.shape)
        _no_parameters(entry.name, entry.parameters)
        if raw and entry.HasField("contents"):
            raise invalid(f"{entry.name}: contents and raw_input_contents exclude each other", param=entry.name)
        value = tensors.from_raw(entry.name, entry.datatype, shape, raw[index]) if raw else _typed(entry)
        inputs.append(oip.Input(entry.name, entry.datatype, shape, value))
    requested: dict[str, bool | None] = {}
    for output in request.outputs:
        if output.name in requested:
            raise invalid(f"output {output.name[:96]!r} is requested twice", param="outputs")
        _no_parameters(output.name, output.parameters, ignored=("binary_data",))  # always raw here
        requested[output.name] = None
    return oip.Infer(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        inputs=tuple(inputs),
        parameters={name: _parameter(name, value) for name, value in request.parameters.items()},
        outputs=requested,
        binary=True,
    )


def _typed(entry: pb.ModelInferRequest.InferInputTensor) -> tensors.Value:
    """FP16 and BF16 have no typed field: `from_list` says so."""
    wanted = _CONTENTS.get(entry.datatype)
    filled = [descriptor.name for descriptor, _ in entry.contents.ListFields()]
    if any(name != wanted for name in filled) and wanted is not None:
        raise invalid(f"{entry.name}: {entry.datatype} belongs in {wanted}, got {', '.join(filled)}", param=entry.name)
    values: list[Any] = list(getattr(entry.contents, wanted)) if wanted else []
    return tensors.from_list(entry.name, entry.datatype, tuple(entry.shape), values)


def _no_parameters(name: str, parameters: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    for unknown in parameters:
        if unknown not in ignored:
            raise invalid(f"{name[:96]}: parameter {unknown[:96]!r} is unknown", param=name[:96])


def _parameter(name: str, value: pb.InferParameter) -> bool | int | float | str:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameter {name[:96]!r} has no value", param=name[:96])
    chosen: bool | int | float | str = getattr(value, kind)
    return chosen


def render_message(answer: Answer, request: Request, infer: oip.Infer) -> pb.ModelInferResponse:
    """The answer with raw outputs; plan, error and price as parameters."""
    response = pb.ModelInferResponse(model_name=infer.model, model_version=metadata.MODEL_VERSION, id=infer.id)
    for name, text in headers(answer).items():
        response.parameters[name].string_param = text
    for name, tensor in oip.outputs(answer, request).items():
        response.outputs.add(name=name, datatype=tensors.datatype_of(tensor), shape=tensor.shape)
        response.raw_output_contents.append(bytes(tensors.to_raw(tensor)))
    return response
