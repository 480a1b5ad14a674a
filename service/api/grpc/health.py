"""Registers grpc.health.v1 with Serve's gRPC server; the proxies import this too, so it stays light."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from service.api.grpc.requests import reader

HEALTH_SERVICE = "grpc.health.v1.Health"


def add_health_to_server(servicer: Any, server: Any) -> None:
    """Register `Check` alone: the stock registration also offers List and Watch, which Serve would fail to find."""
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(
            servicer.Check,
            request_deserializer=reader(health_pb2.HealthCheckRequest),
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH_SERVICE, handlers),))
