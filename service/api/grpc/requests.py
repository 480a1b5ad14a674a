"""Registers the Open Inference Protocol with Serve's gRPC server; the proxies import this too, so it stays light.

gRPC answers INTERNAL where a message cannot be read, for example a string that is not UTF-8, and our methods are not
called. So they get `Unreadable` instead of the message, and say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from service.api.proto import open_inference_grpc_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")

Read = TypeVar("Read", covariant=True)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of a message that cannot be read."""

    message: str  # its type


class MessageType(Protocol[Read]):
    __name__: str

    def FromString(self, content: bytes) -> Read: ...


def reader(message: MessageType[Read]) -> Callable[[bytes], Read | Unreadable]:
    def read(content: bytes) -> Read | Unreadable:
        try:
            return message.FromString(content)
        except DecodeError:
            return Unreadable(message.__name__)

    return read


def add_inference_to_server(servicer: Any, server: Any) -> None:
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=reader(getattr(pb, f"{name}Request")),
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
