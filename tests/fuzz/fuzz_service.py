"""A real service, over HTTP and gRPC: the same requests, and bytes that are no HTTP; its memory comes back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import grpc
import httpx
import psutil
import pytest
from google.protobuf.message import DecodeError
from hypothesis import note

from service.api.proto import open_inference_grpc_pb2 as pb
from service.telemetry.heap_trim import EVERY_S
from tests.e2e.conftest import Service, start, stop
from tests.fuzz.bodies import TARGETS
from tests.fuzz.conftest import CASES, each, save_models
from tests.fuzz.messages import messages
from tests.fuzz.sent import SLOWEST_S, Got, Sent, Tally, check
from tests.fuzz.values import damaged

PORT = 25_000
NETWORK_CASES = max(20, CASES // 10)
WARM = 60
GROWTH = 1.10
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Service]:
    tally.name = "service"
    models = (
        "["
        + ",".join(one.model_dump_json(exclude_defaults=True) for one in save_models(tmp_path_factory.mktemp("m")))
        + "]"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARSIGHT_MODELS", models)
        running = start(tmp_path_factory.mktemp("farsight"), PORT, "--demo")
    yield running
    assert stop(running) == 0


def replica_bytes(service: Service) -> int:
    children = psutil.Process(service.process.pid).children(recursive=True)
    (replica,) = (process for process in children if "ServeReplica" in "".join(process.cmdline()))
    return int(replica.memory_info().rss)


def test_bodies(service: Service, tally: Tally) -> None:
    with httpx.Client(base_url=service.url, timeout=2 * SLOWEST_S) as client:

        def send(sent: Sent, into: Tally = tally) -> None:
            note(repr(sent))
            path = sent.path.encode("ascii", "replace").replace(b"\0", b"%00")
            url = client.base_url.copy_with(
                raw_path=path + (b"?" + sent.query.encode("ascii", "replace") if sent.query else b"")
            )
            headers = [(name, value.encode()) for name, value in sent.headers if name not in ("expect",)]
            start_s = time.perf_counter()
            answer = client.request(sent.method, url, headers=headers, content=sent.body)
            got = Got(answer.status_code, answer.headers.multi_items(), answer.content, time.perf_counter() - start_s)
            if sent.method != "HEAD":
                check(sent, got, into, behind_haproxy=True)

        tally.memory_at_start = replica_bytes(service)
        for strategy in TARGETS.values():
            each(strategy, lambda sent: send(sent, Tally()), WARM)
        time.sleep(1.5 * EVERY_S)  # a replica returns freed memory that often, and says nothing of it
        tally.memory_before = replica_bytes(service)
        for strategy in TARGETS.values():
            each(strategy, send, NETWORK_CASES)


def test_messages(service: Service, tally: Tally) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        call = channel.unary_unary(METHOD)

        def send(raw: bytes) -> None:
            with suppress(DecodeError):
                note(str(pb.ModelInferRequest.FromString(raw)))
            start_s, code = time.perf_counter(), grpc.StatusCode.OK
            try:
                _, answer = call.with_call(raw, timeout=2 * SLOWEST_S)
            except grpc.RpcError as error:
                answer, code = error, error.code()
            seconds = time.perf_counter() - start_s
            tally.add("messages", code.name, seconds, is_parsed=code is not grpc.StatusCode.NOT_FOUND)
            assert seconds < SLOWEST_S
            if code is grpc.StatusCode.INTERNAL and "deserializ" in answer.details():
                return  # of gRPC's own library, for bytes that are no message
            allowed = {
                "OK",
                "INVALID_ARGUMENT",
                "NOT_FOUND",
                "RESOURCE_EXHAUSTED",
                *(["DEADLINE_EXCEEDED"] * (b"timeout" in raw)),
            }
            assert code.name in allowed, answer.details()
            assert [name for name, _ in answer.trailing_metadata()].count("x-request-id") == 1

        each(messages(), send, NETWORK_CASES)


def test_bytes_that_are_no_http(service: Service, tally: Tally) -> None:
    """Each is answered or closed in time, and the next caller is served."""
    head = b"POST /v1/attention HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += b"content-length: 2\r\n\r\n{}"

    def send(raw: bytes) -> None:
        note(repr(raw))
        start_s, answer = time.perf_counter(), b""
        with socket.create_connection(("127.0.0.1", service.http_port), timeout=2 * SLOWEST_S) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    answer += part
        seconds = time.perf_counter() - start_s
        status = answer.split(b" ", 2)[1].decode("ascii", "replace") if answer.startswith(b"HTTP/") else "closed"
        tally.add("raw bytes", status, seconds, is_parsed=status in ("200", "422"))
        assert seconds < SLOWEST_S
        assert not status.startswith("5"), answer
        if b"<h1>" not in answer and answer:
            assert answer.lower().count(b"\r\nx-request-id: ") == 1, answer

    each(damaged(head, 4), send, NETWORK_CASES)


def test_it_is_well_afterwards(service: Service, tally: Tally) -> None:
    assert httpx.get(f"{service.url}/readyz", timeout=SLOWEST_S).status_code == 200
    log = service.log.read_text()
    assert "Traceback" not in log, log[-3000:]
    deadline = time.monotonic() + 3 * EVERY_S
    tally.memory_after = replica_bytes(service)
    while tally.memory_after >= GROWTH * tally.memory_before and time.monotonic() < deadline:
        time.sleep(1)
        tally.memory_after = replica_bytes(service)
    assert tally.memory_after < GROWTH * tally.memory_before
