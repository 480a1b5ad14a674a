"""Logs with one JSON object per line: what happened and what it cost, never the contents of a request."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime

import orjson


class JsonFormatter(logging.Formatter):
    """Writes time, level, message, and the fields in `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as JSON text."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            # not formatException: it calls print, which Serve replaces
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return orjson.dumps(line, default=str).decode()


def configure(level: str) -> None:
    """Write the `farsight` logger to stderr as JSON, from `level` on."""
    # the process's own stderr: Serve replaces sys.stderr with a logger that walks the stack at every line
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("farsight")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    # A line that cannot be written is lost. By default it would be reported on sys.stderr, which Serve turns into a log
    # that cannot be written either: on a full disk every line, ours and Serve's, would end in a RecursionError
    logging.raiseExceptions = False


def about(request_id: str) -> dict[str, dict[str, str]]:
    """The argument `extra` of a log line about this request."""
    return {"fields": {"request_id": request_id}}
