"""Log lines are one JSON object each: one for every request, with what it used and nothing of what it was asked."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest

from service.api.http.app import create_app
from service.engine.engine import Engine
from service.engine.workloads.attention import AttentionWorkload
from service.telemetry.logging import JsonFormatter
from tests.api import test_grpc as grpc
from tests.disks import Disk, disk
from tests.telemetry.followed import SMALL, Grpc, ask, engine_like, leave_while_it_runs, long_body, post

__all__ = ["disk"]

ALWAYS = {"time", "level", "message", "request_id", "transport", "endpoint", "code", "total_s"}


@contextmanager
def logged(engine: Engine, caplog: pytest.LogCaptureFixture, **changes: Any) -> Iterator[tuple[Engine, list[Any]]]:
    """An engine that logs requests, and the lines, there once it has been left."""
    lines: list[Any] = []
    with caplog.at_level(logging.INFO, logger="farsight"):
        with engine_like(engine, request_log=True, **changes) as other:
            yield other, lines
        lines += [
            orjson.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "farsight"
        ]


def test_a_line_is_the_answers_record(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with logged(engine, caplog, price_per_device_hour_usd=7.0) as (other, lines):
        body = post(other, "/v1/attention", x_request_id="mine").json()
    (line,) = lines
    assert set(line) >= ALWAYS
    assert (line["message"], line["request_id"], line["code"]) == ("answered", "mine", 200)
    assert (line["endpoint"], line["transport"], line["tenant"]) == ("attention", "http", "default")
    assert (line["plan"], line["tokens"], line["flops"]) == (body["plan"]["kind"], 1, body["usage"]["flops"])
    assert line["cost_usd"] == body["cost"]["usd"] > 0
    for name in ("queue_s", "device_s", "paused_s", "total_s"):
        assert line[name] == pytest.approx(body["timing"][name], abs=1e-6)
    assert "reason" not in line
    assert "123.5" not in caplog.text


def test_grpc_has_the_same_line(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with logged(engine, caplog) as (other, lines):
        asyncio.run(Grpc(other).ModelInfer(grpc.attention(), grpc.Context(x_request_id="g1")))
        asyncio.run(Grpc(other).ModelInfer(grpc.attention(mode="fast"), grpc.Context(x_request_id="g2")))
    answered, refused = lines
    assert (answered["transport"], answered["request_id"], answered["message"]) == ("grpc", "g1", "answered")
    assert (refused["request_id"], refused["message"], refused["code"]) == ("g2", "refused", 422)


@pytest.mark.parametrize(
    ("path", "body", "code", "reason"),
    [
        ("/v1/attention", {**SMALL, "mode": "fast"}, 422, "invalid"),
        ("/v1/attention", {**long_body(2048), "timeout_s": 1e-6}, 504, "predicted_late"),
        ("/v1/embeddings", {"model": "secret", "input": "secret"}, 404, "model_not_found"),
        ("/v1/embeddings", {"model": "all-MiniLM-L6-v2", "input": "secret " * 999}, 413, "context_length_exceeded"),
        ("/secret", {}, 404, "not_found"),
    ],
)
def test_a_refusal_has_its_line(
    engine: Engine, caplog: pytest.LogCaptureFixture, path: str, body: Any, code: int, reason: str
) -> None:
    with logged(engine, caplog) as (other, lines):
        assert post(other, path, body).status_code == code
    (line,) = lines
    assert set(line) >= ALWAYS
    assert (line["message"], line["code"], line["reason"]) == ("refused", code, reason)
    assert line.get("device_s", 0.0) == 0
    assert "secret" not in str(line)


def test_every_line_about_a_bug_has_the_request_id(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(AttentionWorkload, "_attend", broken)
    with logged(engine, caplog) as (other, lines):
        assert post(other, "/v1/attention", x_request_id="mine").status_code == 500
        asyncio.run(Grpc(other).ModelInfer(grpc.attention(), grpc.Context(x_request_id="mine")))
        monkeypatch.setattr("service.api.http.attention.parse_attention", broken)
        assert post(other, "/v1/attention", x_request_id="mine").status_code == 500
    assert [line["request_id"] for line in lines] == ["mine"] * 6
    assert [line["message"] for line in lines] == ["request mine failed", "failed"] * 3
    assert "KeyError" in lines[0]["exception"]
    assert (lines[1]["kind"], lines[1]["code"]) == ("internal", 500)
    assert lines[1]["device_s"] > 0  # a run that failed took its time


def test_a_caller_who_left_is_told_with_the_device_time_that_went_to_it(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with logged(engine, caplog) as (other, lines):
        asyncio.run(leave_while_it_runs(other))
    (line,) = lines
    assert (line["message"], line["code"], line["request_id"]) == ("cancelled", 499, "left")
    assert line["device_s"] > 0
    device_usd, host_usd = (
        engine.config.price_per_device_hour_usd / 3600,
        engine.config.price_per_host_hour_usd / 3600,
    )
    # seconds are logged to the microsecond, and work that stops at once takes only a few
    usd = line["device_s"] * device_usd + line["host_s"] * host_usd
    assert line["cost_usd"] == pytest.approx(usd, rel=1e-3, abs=0.5e-6 * (device_usd + host_usd))


def test_callers_who_leave_or_are_late_get_one_line_each(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def crowd(other: Engine) -> None:
        app, tasks = create_app(other), []
        for index in range(60):
            body = long_body(1024 if index % 7 else 4096) | ({} if index % 5 else {"timeout_s": 0.05})
            tasks.append(asyncio.create_task(ask(app, "/v1/attention", body, x_request_id=f"r{index}")))
            await asyncio.sleep(0.002 * (index % 3))
            if index % 4 == 0:
                tasks[index // 2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ask(app, "/v1/attention", x_request_id="last")

    with logged(engine, caplog) as (other, lines):
        asyncio.run(crowd(other))
    # those cancelled before their first step never were requests
    told = sorted(line["request_id"] for line in lines)
    assert len(told) == len(set(told))
    assert {line["message"] for line in lines} >= {"answered", "cancelled"}
    assert {f"r{index}" for index in range(60) if index not in {2 * one for one in range(16)}} <= set(told)


def test_a_device_that_dies_leaves_no_request_untold(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(AttentionWorkload, "_attend", lost)
    with logged(engine, caplog) as (other, lines):
        assert post(other, "/v1/attention", x_request_id="mine").status_code == 503
    assert [(line["message"], line["code"]) for line in lines if line.get("request_id") == "mine"] == [("failed", 503)]


def test_exceptions_are_logged_whole() -> None:
    try:
        raise ValueError("inside")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "request %s failed", "args": ("r2",), "exc_info": (ValueError, error, None)}
        )
    line = orjson.loads(JsonFormatter().format(record))
    assert line["message"] == "request r2 failed"
    assert "ValueError: inside" in line["exception"]


# logs into a file on a full disk, as a replica does: its own stderr, and Serve's logger behind sys.stderr
REPLICA = """
import logging, sys
from ray.serve._private.logging_utils import StreamToLogger
from service.telemetry.logging import configure
serve = logging.getLogger("ray.serve")
serve.propagate = False
serve.addHandler(logging.FileHandler(sys.argv[1]))
sys.stderr = StreamToLogger(serve, logging.ERROR, sys.stderr)
configure("INFO")
print("ready", flush=True)
for line in sys.stdin:
    logging.getLogger("farsight").error(line.strip())
    serve.error(line.strip())
    print("logged", flush=True)
"""


def test_lines_that_a_full_disk_cannot_take_stop_nothing(disk: Disk) -> None:
    with (disk.root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", REPLICA, str(disk.root / "serve.log")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    disk.fill()
    for line in ("while it is full", "x" * 10_000):
        print(line, file=process.stdin, flush=True)
        assert process.stdout.readline() == "logged\n"
    disk.free()
    print("once it has room", file=process.stdin, flush=True)
    assert process.stdout.readline() == "logged\n"
    process.communicate()
    assert process.returncode == 0
    for name in ("stderr", "serve.log"):
        assert "once it has room" in (disk.root / name).read_text()
