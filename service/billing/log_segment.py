"""One file of a write-ahead log: its lines as rows of the ledger, and recording them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from service.billing.ledger import Ledger, RowsRefused

logger = logging.getLogger("farsight")

BLOCK_ROWS = 2000  # sent to the ledger in one call
ACCEPTED, SETTLED, CAPACITY = "a", "s", "c"


@dataclass(slots=True)
class Segment:
    """Contents of one file. Rows carry the key of the ledger's tables."""

    path: Path
    lines: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)  # settled
    capacity: list[dict[str, Any]] = field(default_factory=list)
    accepted: dict[int, dict[str, Any]] = field(default_factory=dict)  # and not settled in this file, by number


def read(path: Path, content: bytes, log_id: str) -> Segment:
    """The file's lines. One that cannot be read is logged and left out."""
    segment = Segment(path)
    for kind, number, row in _lines(path, content):
        segment.lines += 1
        row |= {"journal": log_id, "number": number}
        if kind == ACCEPTED:
            segment.accepted[number] = row
        elif kind == SETTLED:
            segment.accepted.pop(number, None)
            segment.requests.append(row)
        else:
            segment.capacity.append(row)
    return segment


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for line in content.rstrip(b"\0").splitlines():
        try:
            kind, number, row = orjson.loads(line)
        except ValueError:  # its writer was killed while writing it, and had not answered yet
            logger.error("%s: unreadable line of %d bytes", path, len(line))
            continue
        yield kind, number, row


def record(ledger: Ledger, segment: Segment) -> None:
    """Record its rows, and those that the database rejects one by one. Raises LedgerError."""
    for start in range(0, max(len(segment.requests), len(segment.capacity)), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        try:
            ledger.record(segment.requests[block], segment.capacity[block])
        except RowsRefused:
            for row in segment.requests[block]:
                _record_alone(ledger, row, is_capacity=False)
            for row in segment.capacity[block]:
                _record_alone(ledger, row, is_capacity=True)


def _record_alone(ledger: Ledger, row: dict[str, Any], *, is_capacity: bool) -> None:
    """A row that the database rejects must not block the others; then this log line is its only trace."""
    try:
        ledger.record([] if is_capacity else [row], [row] if is_capacity else [])
    except RowsRefused as error:
        logger.error("the ledger rejected a row: %s: %s", error, row)
