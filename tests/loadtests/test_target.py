"""A running service must answer before it is loaded, and its ports must belong to the same service."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from benchmarks.servers.process import Unavailable
from loadtests.target import running


class Ready(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Starting(Ready):
    status = 503


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1:8000", "http://"])
def test_it_must_be_a_url(url: str) -> None:
    with pytest.raises(ValueError, match=f"url: expected for example http://127.0.0.1:8000, got '{re.escape(url)}'"):
        running(url, 9000, 9464)


def test_another_port_needs_the_others_of_the_same_service() -> None:
    with pytest.raises(ValueError, match="--grpc-port and --metrics-port"):
        running("http://127.0.0.1:8100", None, 9464)


def test_a_service_that_does_not_listen() -> None:
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1/readyz: .*refused"):
        running("http://127.0.0.1:1/", 9000, 9464)


def test_a_service_that_is_not_ready() -> None:
    with answering(Starting) as url, pytest.raises(Unavailable, match="503"):
        running(url, 1, 1)


def test_a_service_without_grpc() -> None:
    with answering(Ready) as url, pytest.raises(Unavailable, match=r"gRPC at 127\.0\.0\.1:1: UNAVAILABLE"):
        running(url, 1, 1)
