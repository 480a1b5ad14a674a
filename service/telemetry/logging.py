"""Logs as one JSON object a line: what happened and what it cost, never what the request contained."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime

import orjson

from service.core import Answer


class JsonFormatter(logging.Formatter):
    """time, level, message, and whatever was put under `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            # not formatException: it prints, and Serve replaces print
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return orjson.dumps(line, default=str).decode()


def configure(level: str) -> None:
    """The `farsight` logger to stderr, as JSON."""
    # the process's own stderr: Serve replaces sys.stderr by a logger that walks the stack at every line
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("farsight")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def fields(endpoint: str, answer: Answer) -> dict[str, object]:
    """The log line of one answer; the same record as its headers."""
    return {
        "request_id": answer.id,
        "endpoint": endpoint,
        "model": answer.model,
        "plan": answer.plan.kind.value,
        "error": answer.error.kind,
        "fallback": answer.error.fallback,
        "tokens": answer.usage.tokens,
        "flops": answer.usage.flops,
        "cost_usd": answer.usage.cost_usd,
        "queue_s": round(answer.timing.queue_s, 6),
        "device_s": round(answer.timing.device_s, 6),
        "paused_s": round(answer.timing.paused_s, 6),
        "total_s": round(answer.timing.total_s, 6),
    }
