"""Requests accepted and settled by one replica, logged before the caller gets an answer: the log survives `kill -9`.

Each replica appends to its own files through memory maps, which the kernel keeps when the process dies (a write call
would let other threads run first, and cost as much as a small request itself), and holds a file lock while it lives.
The usage meter ships the rows to the ledger and deletes the files. A log with a free lock belongs to a dead replica;
the first replica that finds it recovers it. The ledger identifies rows by (log id, number), so shipping a row again
changes nothing.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from service.billing.ledger import Ledger, RowsRefused
from service.billing.row import CapacityRow, LedgerRow

logger = logging.getLogger("farsight")

SEGMENT_BYTES = 1 << 20
BLOCK_ROWS = 2000  # sent to the ledger in one call
ACCEPTED, SETTLED, CAPACITY = "a", "s", "c"


@dataclass(slots=True)
class _Segment:
    """Contents of one file. Rows carry the key of the ledger's tables."""

    path: Path
    lines: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)  # settled
    capacity: list[dict[str, Any]] = field(default_factory=list)
    accepted: dict[int, dict[str, Any]] = field(default_factory=dict)  # and not settled in this file, by number


class WriteAheadLog:
    """The log of one replica. One thread writes lines; `ship` may be called by another."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError if the files cannot be created."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.id = uuid.uuid4().hex
        self._directory = directory
        self._lock = _create_locked(_lock_path(directory, self.id))
        self._number = self._segments = 0
        self._guard = threading.Lock()
        self.pending = 0  # lines that the ledger has not recorded yet
        self._used_bytes = 0  # of the current file
        self._file = self._open()
        self._closed: list[Path] = []  # to be shipped
        self._unsettled: dict[int, Path] = {}  # requests accepted in a shipped file, which is kept until they settle

    def accepted(self, row: LedgerRow) -> int:
        """Log an accepted request and return its number. Raises OSError if the disk is full."""
        number = self._next_number()
        self._write(ACCEPTED, number, row)
        return number

    def settled(self, number: int, row: LedgerRow) -> None:
        """Log the settlement of a request by its number. Raises OSError if the disk is full."""
        self._write(SETTLED, number, row)

    def unaccepted(self, row: LedgerRow) -> None:
        """Log a request that used something, and was never accepted. Raises OSError if the disk is full."""
        self._write(SETTLED, self._next_number(), row)

    def capacity(self, row: CapacityRow) -> None:
        """Log a stretch of device time. Raises OSError if the disk is full."""
        self._write(CAPACITY, self._next_number(), row)

    def ship(self, ledger: Ledger) -> None:
        """Record all lines written so far in the ledger. Raises LedgerError or OSError; the next call tries again."""
        self._rotate()
        while self._closed:
            segment = _read(self._closed[0], self.id)
            _record(ledger, segment)
            with self._guard:
                self.pending -= segment.lines
            self._unsettled |= dict.fromkeys(segment.accepted, segment.path)
            touched = {segment.path}
            for row in segment.requests:
                if (path := self._unsettled.pop(row["number"], None)) is not None:
                    touched.add(path)
            for path in touched - set(self._unsettled.values()):
                path.unlink(missing_ok=True)
            del self._closed[0]
        os.utime(self._lock)  # keeps cleaners of old files away from it

    def close(self, ledger: Ledger) -> None:
        """Ship, and delete the files unless a request is unsettled. Raises LedgerError or OSError."""
        self.ship(ledger)
        with self._guard:
            self._file.close()
        if not self._unsettled:
            _segment_path(self._directory, self.id, self._segments).unlink()
            _lock_path(self._directory, self.id).unlink()
        os.close(self._lock)

    def _next_number(self) -> int:
        with self._guard:
            self._number += 1
            return self._number

    def _write(self, kind: str, number: int, row: LedgerRow | CapacityRow) -> None:
        line = orjson.dumps([kind, number, row]) + b"\n"
        with self._guard:
            end = self._used_bytes + len(line)
            if end > SEGMENT_BYTES:
                self._next_file()
                end = len(line)
            self._file[end - len(line) : end] = line
            self._used_bytes = end
            self.pending += 1

    def _rotate(self) -> None:
        with self._guard:
            if self._used_bytes:
                self._next_file()

    def _next_file(self) -> None:
        """Close the current file for a new one. If there is no room for it, OSError, and the current one stays."""
        self._segments += 1
        try:
            file = self._open()
        except OSError:
            self._segments -= 1
            raise
        self._file.close()
        self._closed.append(_segment_path(self._directory, self.id, self._segments - 1))
        self._file, self._used_bytes = file, 0

    def _open(self) -> mmap.mmap:
        path = _segment_path(self._directory, self.id, self._segments)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # allocate all blocks now: a full disk at a write to mapped memory would kill the process
            os.posix_fallocate(file, 0, SEGMENT_BYTES)
            return mmap.mmap(file, SEGMENT_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)


def recover(directory: Path, ledger: Ledger) -> int:
    """Ship the logs of dead replicas of this node; the number of requests lost with them.

    Raises LedgerError or OSError; the next call tries again.
    """
    lost = 0
    for lock_path in sorted(directory.glob("*.lock")):
        with _locked_if_dead(lock_path) as is_dead:
            if is_dead:
                lost += _recover_log(directory, lock_path.stem, ledger)
                lock_path.unlink(missing_ok=True)
    return lost


@contextmanager
def _locked_if_dead(path: Path) -> Iterator[bool]:
    """True, and the lock is held, if its replica is dead and no other replica is recovering its log."""
    try:
        file = os.open(path, os.O_WRONLY)
    except FileNotFoundError:  # recovered by another replica meanwhile
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(file)


def _recover_log(directory: Path, log_id: str, ledger: Ledger) -> int:
    segments = [_read(path, log_id) for path in sorted(directory.glob(f"{log_id}-*.jsonl"))]
    settled = {row["number"] for segment in segments for row in segment.requests}
    lost = 0
    for segment in segments:
        lost_rows = [row for number, row in segment.accepted.items() if number not in settled]
        segment.requests += lost_rows
        lost += len(lost_rows)
        _record(ledger, segment)
    for segment in segments:
        segment.path.unlink(missing_ok=True)
    return lost


def _record(ledger: Ledger, segment: _Segment) -> None:
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


def _create_locked(path: Path) -> int:
    """Create a lock file and lock it; again if another replica took it for a dead one and deleted it in between."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        os.close(file)


def _read(path: Path, log_id: str) -> _Segment:
    segment = _Segment(path)
    for kind, number, row in _lines(path):
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


def _lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if not path.exists():
        logger.error("%s was deleted, and its lines are lost", path)
        return
    for line in path.read_bytes().rstrip(b"\0").splitlines():
        try:
            kind, number, row = orjson.loads(line)
        except ValueError:  # its writer was killed while writing it, and had not answered yet
            logger.error("%s: unreadable line of %d bytes", path, len(line))
            continue
        yield kind, number, row


def _lock_path(directory: Path, log_id: str) -> Path:
    return directory / f"{log_id}.lock"


def _segment_path(directory: Path, log_id: str, index: int) -> Path:
    return directory / f"{log_id}-{index:08d}.jsonl"
