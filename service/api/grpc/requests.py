"""Registers the Open Inference Protocol with Serve's gRPC server; the proxies import this too, so it stays light.

gRPC answers INTERNAL where a message cannot be read, for example a string that is not UTF-8, and our methods are not
called. So they get `Unreadable` instead of the message, and say what is wrong.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from service.api.proto import open_inference_grpc_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
# methods that need a key, and how metrics name them
KEYED = {
    "ServerMetadata": "server_metadata",
    "ModelReady": "model_ready",
    "ModelMetadata": "model_metadata",
    "ModelInfer": "infer",
}
METHODS = ("ServerLive", "ServerReady", *KEYED)

Read = TypeVar("Read", covariant=True)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of a message that cannot be read."""

    message: str  # its type


class MessageType(Protocol[Read]):
    __name__: str

    def FromString(self, content: bytes) -> Read: ...


Metadata = Sequence[tuple[str, str | bytes]]
Refuse = Callable[[Any, Any], Awaitable[bytes]]  # called with the messages, which it need not receive, and the context


@dataclass
class Door:
    """Says who may send a message, before it is received. Serve registers services without any of our objects, so
    each replica opens its own door here; a proxy has none, and its replica asks.
    """

    refusal: Callable[[str, Metadata], Refuse | None] | None = None  # of a method; None: it may be called


DOOR = Door()


def reader(message: MessageType[Read]) -> Callable[[bytes], Read | Unreadable]:
    def read(content: bytes) -> Read | Unreadable:
        try:
            return message.FromString(content)
        except DecodeError:
            return Unreadable(message.__name__)

    return read


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """gRPC asks for the handler of a call when it has the metadata, and receives the message for a unary one."""

    def __init__(self, handlers: dict[str, Any]) -> None:
        self._method_handlers = {f"/{SERVICE}/{name}": handler for name, handler in handlers.items()}  # Serve sets it

    def service(self, details: Any) -> Any:
        handler, name = self._method_handlers.get(details.method), details.method.rpartition("/")[2]
        if handler is None or name not in KEYED or DOOR.refusal is None:
            return handler
        refuse = DOOR.refusal(KEYED[name], details.invocation_metadata)
        return handler if refuse is None else grpc.stream_unary_rpc_method_handler(refuse)


def add_inference_to_server(servicer: Any, server: Any) -> None:
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=reader(getattr(pb, f"{name}Request")),
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((_Handlers(handlers),))
