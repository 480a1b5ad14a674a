"""Logs as one JSON object a line: what happened and what it cost, never what the request contained."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime

import orjson


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


def about(request_id: str) -> dict[str, dict[str, str]]:
    """For `extra`: the request that a line is about."""
    return {"fields": {"request_id": request_id}}
