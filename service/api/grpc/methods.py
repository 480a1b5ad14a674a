"""gRPC methods of the Serve ingress class: the Open Inference Protocol and grpc.health.v1.

Serve calls a method by the name of its RPC with the message and its own context. A method that raises loses the
trailing metadata and puts a traceback into Serve's log, so a failure is an empty message with the code set: the
client sees the same status either way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial, wraps
from typing import Any, Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from service.api.grpc.messages import message_bytes, parse_message, render_message, render_price
from service.api.grpc.requests import SERVICE, Metadata, Refuse, Unreadable
from service.api.handler import Call, Exchange, Handler, Parsed, request_id
from service.api.open_inference.metadata import find_model, model_metadata, server_metadata
from service.api.open_inference.protocol import InferRequest, parse_infer
from service.api.proto import open_inference_grpc_pb2 as pb
from service.billing.tenants import key_of
from service.errors import CODES, FarsightError, Kind, malformed, retry_after
from service.telemetry.request_record import Received, RequestRecord


class Context(Protocol):
    """What is used of ray.serve.grpc_util.RayServegRPCContext."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...


Message = TypeVar("Message")
Method = Callable[["GrpcMethods", Any, Context], Awaitable[Message]]


def read(endpoint: str, empty: type[Message]) -> Callable[[Method[Message]], Method[Message]]:
    """Around a method: it is called with a message; what cannot be read is INVALID_ARGUMENT."""

    def decorate(method: Method[Message]) -> Method[Message]:
        @wraps(method)  # Serve looks for `grpc_context` in the signature
        async def answered(self: GrpcMethods, request: Any, grpc_context: Context) -> Message:
            if not isinstance(request, Unreadable):
                return await method(self, request, grpc_context)

            async def refuse(_: RequestRecord) -> Message:
                raise malformed(f"expected {request.message} in protobuf with strings in UTF-8")

            return await self._respond(endpoint, grpc_context, refuse, empty())

        return answered

    return decorate


class GrpcMethods:
    """Mixed into the ingress class, which sets `handler`."""

    handler: Handler

    @read("server_live", pb.ServerLiveResponse)
    async def ServerLive(self, request: pb.ServerLiveRequest, grpc_context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @read("server_ready", pb.ServerReadyResponse)
    async def ServerReady(self, request: pb.ServerReadyRequest, grpc_context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.handler.service.ready)

    @read("server_metadata", pb.ServerMetadataResponse)
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, grpc_context: Context
    ) -> pb.ServerMetadataResponse:
        async def metadata(record: RequestRecord) -> pb.ServerMetadataResponse:
            self._call(record, grpc_context)
            return pb.ServerMetadataResponse(**server_metadata())

        return await self._respond("server_metadata", grpc_context, metadata, pb.ServerMetadataResponse())

    @read("model_ready", pb.ModelReadyResponse)
    async def ModelReady(self, request: pb.ModelReadyRequest, grpc_context: Context) -> pb.ModelReadyResponse:
        async def ready(record: RequestRecord) -> pb.ModelReadyResponse:
            self._call(record, grpc_context)
            service = self.handler.service
            find_model(request.name, request.version, service.model_infos())
            return pb.ModelReadyResponse(ready=service.alive)

        return await self._respond("model_ready", grpc_context, ready, pb.ModelReadyResponse())

    @read("model_metadata", pb.ModelMetadataResponse)
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, grpc_context: Context) -> pb.ModelMetadataResponse:
        async def metadata(record: RequestRecord) -> pb.ModelMetadataResponse:
            self._call(record, grpc_context)
            document = model_metadata(request.name, request.version, self.handler.service.model_infos())
            return pb.ModelMetadataResponse(**document)

        return await self._respond("model_metadata", grpc_context, metadata, pb.ModelMetadataResponse())

    @read("infer", pb.ModelInferResponse)
    async def ModelInfer(self, request: pb.ModelInferRequest, grpc_context: Context) -> pb.ModelInferResponse:
        async def infer(record: RequestRecord) -> pb.ModelInferResponse:
            call, service = self._call(record, grpc_context), self.handler.service
            size = message_bytes(request, service.config.max_request_bytes)
            exchange = Exchange(
                partial(self._parse, request, call),
                size,
                render_message,
                lambda price, parsed: render_price(price, parsed.form, service.hour_usd),
                is_json=False,
            )
            with service.held_bytes() as held:
                held.take(size)
                return await self.handler.answer(call, exchange)

        return await self._respond("infer", grpc_context, infer, pb.ModelInferResponse(), suggested_id=request.id)

    @read("health", health_pb2.HealthCheckResponse)
    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Context
    ) -> health_pb2.HealthCheckResponse:
        async def check(_: RequestRecord) -> health_pb2.HealthCheckResponse:
            if request.service not in ("", SERVICE):
                raise FarsightError(Kind.NOT_FOUND, f"unknown service {request.service[:96]!r}; expected {SERVICE!r}")
            status = health_pb2.HealthCheckResponse
            return status(status=status.SERVING if self.handler.service.ready else status.NOT_SERVING)

        return await self._respond("health", grpc_context, check, health_pb2.HealthCheckResponse())

    def _call(self, record: RequestRecord, context: Context) -> Call:
        """The call with its tenant. Raises FarsightError (401). Only health needs no key, as over HTTP."""
        metadata = _texts(context.invocation_metadata())
        tenant = self.handler.service.tenants.of(key_of(metadata))
        return Call(record.received.id, record.received.endpoint, record, tenant, metadata)

    def refusal(self, endpoint: str, metadata: Metadata) -> Refuse | None:
        """What answers a call without a valid key, of which no message is received; None: the key is valid."""
        try:
            self.handler.service.tenants.of(key_of(_texts(metadata)))
        except FarsightError as error:
            refused = error
        else:
            return None

        async def fail(_: RequestRecord) -> bytes:
            raise refused

        async def refuse(_messages: Any, context: Context) -> bytes:
            return await self._respond(endpoint, context, fail, b"")

        return refuse

    def _parse(self, request: pb.ModelInferRequest, call: Call) -> Parsed[InferRequest]:
        infer = parse_message(request)
        infos = self.handler.service.model_infos()
        parsed = parse_infer(infer, infos, request_id=call.id, timeout_s=call.timeout_s, tenant=call.tenant.name)
        return Parsed(parsed, infer)

    async def _respond(
        self,
        endpoint: str,
        context: Context,
        work: Callable[[RequestRecord], Awaitable[Message]],
        empty: Message,
        *,
        suggested_id: str = "",
    ) -> Message:
        """The message that `work` returns, or `empty` with the status of what it raised."""
        metadata = context.invocation_metadata()
        # the caller's, or the one in the message, or Serve's own (its logs have it)
        given = _value(metadata, "x-request-id"), suggested_id, _value(context.trailing_metadata(), "request_id")
        received = Received(
            id=request_id(*given),
            transport="grpc",
            endpoint=endpoint,
            name=f"{SERVICE}/ModelInfer",
            received_s=self.handler.service.clock(),
            traceparent=_value(metadata, "traceparent"),
            tracestate=_value(metadata, "tracestate"),
        )
        context.set_trailing_metadata([("x-request-id", received.id)])

        def on_error(error: FarsightError) -> Message:
            context.set_code(status_code(error.kind))
            context.set_details(error.message)
            if error.retry_after_s is not None:
                after = retry_after(error.retry_after_s)
                context.set_trailing_metadata([("x-request-id", received.id), ("retry-after", after)])
            return empty

        # the others are called every few seconds, and use nothing
        return await self.handler.respond(received, work, on_error, is_followed=endpoint == "infer")


def status_code(kind: Kind) -> grpc.StatusCode:
    """The gRPC status of a failure, by the one table."""
    return grpc.StatusCode[CODES[kind].grpc]


def _texts(metadata: Metadata) -> dict[str, str]:
    return {name: value for name, value in metadata if isinstance(value, str)}


def _value(metadata: Sequence[tuple[str, str | bytes]], name: str) -> str | None:
    return next((value for key, value in metadata if key == name and isinstance(value, str)), None)
