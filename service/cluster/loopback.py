"""Makes Serve's gRPC servers listen on loopback only.

Only HAProxy on the same machine connects to them. Serve passes the host of `http_options` to its HTTP servers and to
HAProxy, but its gRPC servers (one of which accepts pickles from other replicas) listen on all interfaces, without a
setting for it.
"""

from __future__ import annotations

from grpc.aio import _server

ALL_INTERFACES, LOOPBACK = "[::]:", "127.0.0.1:"


def listen() -> None:
    """Replace the method of grpc.aio with which servers choose their address."""
    original = _server.Server.add_insecure_port

    def add_insecure_port(self: _server.Server, address: str) -> int:
        port: int = original(self, address.replace(ALL_INTERFACES, LOOPBACK))
        return port

    _server.Server.add_insecure_port = add_insecure_port
