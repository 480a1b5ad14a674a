"""Run first in each process of Ray that `farsight serve` starts: Serve's gRPC servers listen on the loopback interface.

Only HAProxy asks them, on the same machine. Serve gives the host of `http_options` to its HTTP servers and HAProxy; its
gRPC servers, one of which takes pickles from other replicas, listen on all interfaces, and it has no setting for them.
"""

from __future__ import annotations

from grpc.aio import _server

EVERYWHERE, LOOPBACK = "[::]:", "127.0.0.1:"


def listen() -> None:
    """Ray's `worker_process_setup_hook`."""
    plain = _server.Server.add_insecure_port

    def add_insecure_port(self: _server.Server, address: str) -> int:
        port: int = plain(self, address.replace(EVERYWHERE, LOOPBACK))
        return port

    _server.Server.add_insecure_port = add_insecure_port
