"""What a replica accepted and settled, written down before the caller knows: it outlives a `kill -9`.

Each replica writes to files of its own, through memory that the kernel keeps (a write call would let other threads run
first, and cost a small request as much as itself), and holds a lock as long as it lives. The books ship what is in them
to the bank and delete them; files whose lock is free are a dead replica's, and whoever sees them first ships them. Rows
carry (journal, number), so one that is shipped twice is in the ledger once.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from service.billing.ledger import Ledger, RowsRefused
from service.billing.row import CapacityRow, LedgerRow

logger = logging.getLogger("farsight")

SEGMENT_BYTES = 1 << 20
BLOCK_ROWS = 2000  # of one call to the bank
ACCEPTED, SETTLED, CAPACITY = "a", "s", "c"


@dataclass(slots=True)
class _Segment:
    """One file: what is in it, once it has been read."""

    path: Path
    lines: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    capacity: list[dict[str, Any]] = field(default_factory=list)
    accepted: dict[int, dict[str, Any]] = field(default_factory=dict)


class WriteAheadLog:
    """Of one replica. Lines are written by one thread; `ship` is called by another."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.id = uuid.uuid4().hex
        self._directory = directory
        self._lock = _held_for_life(_lock_path(directory, self.id))
        self._number = self._segments = 0
        self._guard = threading.Lock()
        self.pending = 0  # lines that the bank has not taken yet
        self._used = 0  # bytes of the file that is written to
        self._file = self._open()
        self._closed: list[Path] = []  # to be shipped
        self._unsettled: dict[int, Path] = {}  # accepted in a shipped file that stays until they are settled

    def accepted(self, row: LedgerRow) -> int:
        """The number of a request that will be settled; OSError where it cannot be written down."""
        number = self._next_number()
        self._write(ACCEPTED, number, row)
        return number

    def settled(self, number: int, row: LedgerRow) -> None:
        """What became of it."""
        self._write(SETTLED, number, row)

    def capacity(self, row: CapacityRow) -> None:
        """What the device did in a stretch of time."""
        self._write(CAPACITY, self._next_number(), row)

    def ship(self, bank: Ledger) -> None:
        """Everything that was written so far into the ledger; what fails is tried again by the next call."""
        self._rotate()
        while self._closed:
            segment = _read(self._closed[0], self.id)
            _record(bank, segment)
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
        os.utime(self._lock)  # what cleans up old files by their age leaves it

    def close(self, bank: Ledger) -> None:
        """Ship, and leave nothing behind where everything is settled."""
        self.ship(bank)
        with self._guard:
            self._file.close()
        if not self._unsettled:
            _current(self._directory, self.id, self._segments).unlink()
            _lock_path(self._directory, self.id).unlink()
        os.close(self._lock)

    def _next_number(self) -> int:
        with self._guard:
            self._number += 1
            return self._number

    def _write(self, kind: str, number: int, row: LedgerRow | CapacityRow) -> None:
        line = orjson.dumps([kind, number, row]) + b"\n"
        with self._guard:
            end = self._used + len(line)
            if end > SEGMENT_BYTES:
                self._next_file()
                end = len(line)
            self._file[end - len(line) : end] = line
            self._used = end
            self.pending += 1

    def _rotate(self) -> None:
        with self._guard:
            if self._used:
                self._next_file()

    def _next_file(self) -> None:
        """OSError where there is no room for it; then the old one stays."""
        self._segments += 1
        try:
            file = self._open()
        except OSError:
            self._segments -= 1
            raise
        self._file.close()
        self._closed.append(_current(self._directory, self.id, self._segments - 1))
        self._file, self._used = file, 0

    def _open(self) -> mmap.mmap:
        path = _current(self._directory, self.id, self._segments)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # its blocks are taken now: to find the disk full at a write to memory would end the process
            os.posix_fallocate(file, 0, SEGMENT_BYTES)
            return mmap.mmap(file, SEGMENT_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)


def adopt(directory: Path, bank: Ledger) -> int:
    """Ship what dead replicas of this node left; the number of requests that were lost with them."""
    lost = 0
    for lock_path in sorted(directory.glob("*.lock")):
        with _if_dead(lock_path) as is_dead:
            if is_dead:
                lost += _take_over(directory, lock_path.stem, bank)
                lock_path.unlink(missing_ok=True)
    return lost


class _if_dead:
    """True within, and nobody else's, where the lock is free."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    def __enter__(self) -> bool:
        try:
            self._file = os.open(self._path, os.O_WRONLY)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # another replica was quicker
            return False
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)


def _take_over(directory: Path, journal: str, bank: Ledger) -> int:
    segments = [_read(path, journal) for path in sorted(directory.glob(f"{journal}-*.jsonl"))]
    settled = {row["number"] for segment in segments for row in segment.requests}
    lost = 0
    for segment in segments:
        gone = [row for number, row in segment.accepted.items() if number not in settled]
        segment.requests += gone
        lost += len(gone)
        _record(bank, segment)
    for segment in segments:
        segment.path.unlink(missing_ok=True)
    return lost


def _record(bank: Ledger, segment: _Segment) -> None:
    for start in range(0, max(len(segment.requests), len(segment.capacity)), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        try:
            bank.record(segment.requests[block], segment.capacity[block])
        except RowsRefused:
            for row in segment.requests[block]:
                _record_alone(bank, row, is_capacity=False)
            for row in segment.capacity[block]:
                _record_alone(bank, row, is_capacity=True)


def _record_alone(bank: Ledger, row: dict[str, Any], *, is_capacity: bool) -> None:
    """One that the database will never take must not keep the others out; the log is all that is left of it."""
    try:
        bank.record([] if is_capacity else [row], [row] if is_capacity else [])
    except RowsRefused as error:
        logger.error("the ledger refuses a row: %s: %s", error, row)


def _held_for_life(path: Path) -> int:
    """A new lock; again where somebody who cleans up was quicker than the lock."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        os.close(file)


def _read(path: Path, journal: str) -> _Segment:
    segment = _Segment(path)
    for kind, number, row in _lines(path):
        segment.lines += 1
        row |= {"journal": journal, "number": number}
        match kind:
            case "a":
                segment.accepted[number] = row
            case "s":
                segment.accepted.pop(number, None)
                segment.requests.append(row)
            case _:
                segment.capacity.append(row)
    return segment


def _lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if not path.exists():
        logger.error("%s is gone, and what was in it", path)
        return
    for line in path.read_bytes().rstrip(b"\0").splitlines():
        try:
            kind, number, row = orjson.loads(line)
        except ValueError:  # its writer was killed in the middle of it, and has told nobody
            logger.error("%s has a line that cannot be read: %d bytes", path, len(line))
            continue
        yield kind, number, row


def _lock_path(directory: Path, journal: str) -> Path:
    return directory / f"{journal}.lock"


def _current(directory: Path, journal: str, index: int) -> Path:
    return directory / f"{journal}-{index:08d}.jsonl"
