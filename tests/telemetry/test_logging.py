"""Log lines are one JSON object each, with what an answer cost and nothing of what it was asked."""

from __future__ import annotations

import logging

import orjson
import torch

from service.core import Answer, ErrorReport, Plan, PlanKind, Timing, Usage, Work
from service.telemetry.logging import JsonFormatter, fields

ANSWER = Answer(
    id="r1",
    tensors={"output": torch.full((1,), 42.0)},
    plan=Plan(PlanKind.DENSE, Work(1, 2, 3, 4), 0.5, "because"),
    error=ErrorReport(),
    usage=Usage(7, 1, 1, 2, 2, 0.25, 4, 1e-6, 0.0),
    timing=Timing(0.1, 0.25, 0.4),
)


def test_a_line_is_the_answers_record() -> None:
    record = logging.makeLogRecord({"msg": "answered", "fields": fields("attention", ANSWER)})
    line = orjson.loads(JsonFormatter().format(record))
    assert (line["message"], line["request_id"], line["plan"]) == ("answered", "r1", "dense")
    assert (line["tokens"], line["device_s"], line["cost_usd"]) == (7, 0.25, 1e-6)
    assert "42" not in orjson.dumps(line).decode().replace(line["time"], "")


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
