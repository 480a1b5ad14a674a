"""In process, for volume: every answer is one of the documented ones, in time, and the memory comes back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import note

from service.api.handler import Handler
from service.api.http.app import App, create_app
from service.api.proto import open_inference_grpc_pb2 as pb
from service.engine.engine import Engine
from tests.api.test_grpc import Context, Methods
from tests.fuzz.bodies import TARGETS
from tests.fuzz.conftest import CASES, each, memory_bytes
from tests.fuzz.messages import messages
from tests.fuzz.sent import SLOWEST_S, Got, Sent, Tally, check

WARM = max(100, CASES // 10)  # cases of each target before memory is compared: caches, pools, heaps of threads
GROWTH = 1.10


async def exchange(app: App, sent: Sent) -> Got:
    """One request, as uvicorn would pass it on."""
    names = [(name.encode(), value.encode("utf-8")) for name, value in sent.headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "root_path": "",
        "query_string": sent.query.encode(),
        "headers": [*names, (b"host", b"test"), (b"content-length", str(len(sent.body)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    bodies, head = [], {}
    waiting = [{"type": "http.request", "body": sent.body, "more_body": False}]

    async def receive() -> Any:
        return waiting.pop() if waiting else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not head, "two answers"
            head.update(message)
        else:
            bodies.append(bytes(message["body"]))

    start_s = time.perf_counter()
    async with asyncio.timeout(2 * SLOWEST_S):
        await app(scope, receive, send)
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head["headers"]]
    return Got(head["status"], headers, b"".join(bodies), time.perf_counter() - start_s)


@pytest.fixture(scope="module")
def in_process(engine: Engine, loop: asyncio.AbstractEventLoop, tally: Tally) -> Any:
    """Sends one case. Its memory is compared at the end with what it was after the first ones."""
    tally.name = "in_process"
    app = create_app(engine)

    def send(sent: Sent) -> None:
        note(repr(sent))
        check(sent, loop.run_until_complete(exchange(app, sent)), tally)

    tally.memory_at_start = memory_bytes()
    for strategy in TARGETS.values():
        each(strategy, lambda sent: loop.run_until_complete(exchange(app, sent)), WARM)
    tally.memory_before = memory_bytes()
    return send


@pytest.mark.parametrize("target", TARGETS)
def test_bodies(target: str, in_process: Any) -> None:
    each(TARGETS[target], in_process)


def test_messages(engine: Engine, in_process: Any, loop: asyncio.AbstractEventLoop, tally: Tally) -> None:
    methods = Methods(engine)
    assert isinstance(methods.handler, Handler)

    def send(raw: bytes) -> None:
        request, context, start_s = pb.ModelInferRequest(), Context(), time.perf_counter()
        try:
            request.ParseFromString(raw)
        except DecodeError:  # gRPC's library answers it, the service does not see it
            tally.add("messages", "DECODE", 0.0, is_parsed=False)
            return
        answer = loop.run_until_complete(asyncio.wait_for(methods.ModelInfer(request, context), 2 * SLOWEST_S))
        seconds, code = time.perf_counter() - start_s, context.code
        tally.add("messages", code.name, seconds, is_parsed=code is not grpc.StatusCode.NOT_FOUND)
        assert seconds < SLOWEST_S
        asked = b"timeout" in raw
        allowed = {
            "OK",
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "RESOURCE_EXHAUSTED",
            *(["DEADLINE_EXCEEDED"] if asked else []),
        }
        assert code.name in allowed, context.details
        assert (code is grpc.StatusCode.OK) == bool(answer.ListFields())
        assert len(context.details) <= 1000
        assert [name for name, _ in context.trailing].count("x-request-id") == 1

    each(messages(), send)


def test_memory_comes_back(in_process: Any, tally: Tally) -> None:
    tally.memory_after = memory_bytes()
    assert tally.memory_after < GROWTH * tally.memory_before
