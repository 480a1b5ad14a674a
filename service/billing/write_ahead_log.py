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
from pathlib import Path

import orjson

from service.billing.ledger import Ledger
from service.billing.log_segment import ACCEPTED, CAPACITY, SETTLED, read, record
from service.billing.row import CapacityRow, LedgerRow
from service.disk import is_full, map_allocated

logger = logging.getLogger("farsight")

SEGMENT_BYTES = 1 << 20
ROW_BYTES = 2048  # at most, of one line


class WriteAheadLog:
    """The log of one replica. One thread writes lines; `ship` may be called by another."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError if the files cannot be created. If the disk is full they are created once it has room."""
        self.id = uuid.uuid4().hex
        self._directory = directory
        self._lock: int | None = None
        self._number = self._segments = 0
        self._guard = threading.Lock()
        self.pending = 0  # lines that the ledger has not recorded yet
        self._file: mmap.mmap | None = None
        self._path = directory  # of the current file
        self._used_bytes = SEGMENT_BYTES  # of the current file
        self._spares: list[tuple[Path, mmap.mmap]] = []  # the files after it
        self._running: set[int] = set()  # requests that must still find room for their settlement
        self._closed: list[tuple[Path, mmap.mmap]] = []  # to be shipped
        self._unsettled: dict[int, Path] = {}  # requests accepted in a shipped file, which is kept until they settle
        try:
            self._next_file()
        except OSError as error:
            if not is_full(error):
                raise
            logger.error("requests cannot be accepted until they can be logged: %s", error)

    def accepted(self, row: LedgerRow) -> int:
        """Log an accepted request, with room for its settlement, and return its number.

        Raises OSError if the disk is full.
        """
        number = self._next_number()
        self._write(ACCEPTED, number, row)
        return number

    def settled(self, number: int, row: LedgerRow) -> None:
        """Log the settlement of a request by its number. It has room on a full disk, too."""
        self._write(SETTLED, number, row)

    def unaccepted(self, row: LedgerRow) -> None:
        """Log a request that used something, and was never accepted. Raises OSError if the disk is full."""
        self._write(SETTLED, self._next_number(), row)

    def capacity(self, row: CapacityRow) -> None:
        """Log a stretch of device time. Raises OSError if the disk is full."""
        self._write(CAPACITY, self._next_number(), row)

    def ship(self, ledger: Ledger) -> None:
        """Record all lines written so far in the ledger. Raises LedgerError or OSError; the next call tries again."""
        self._ship_closed(ledger)  # first: while the ledger is away, files are closed only when they are full
        full = self._rotate()
        self._ship_closed(ledger)
        if full is not None:
            raise full
        if self._lock is not None:
            os.utime(self._lock)  # keeps cleaners of old files away from it

    def close(self, ledger: Ledger) -> None:
        """Ship, and delete the files unless a request is unsettled. Raises LedgerError or OSError."""
        self.ship(ledger)
        if self._lock is None or self._file is None:  # the disk was full all the time
            return
        with self._guard:
            self._file.close()
        for path in (self._path, *(path for path, _ in self._spares)) if not self._unsettled else ():
            path.unlink(missing_ok=True)
        if not self._unsettled:
            _lock_path(self._directory, self.id).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _ship_closed(self, ledger: Ledger) -> None:
        while self._closed:
            path, file = self._closed[0]
            segment = read(path, bytes(file), self.id)  # also if the file was deleted
            record(ledger, segment)
            with self._guard:
                self.pending -= segment.lines
            self._unsettled |= dict.fromkeys(segment.accepted, path)
            touched = {path}
            for row in segment.requests:
                if (accepted_in := self._unsettled.pop(row["number"], None)) is not None:
                    touched.add(accepted_in)
            for done in touched - set(self._unsettled.values()):
                done.unlink(missing_ok=True)
            del self._closed[0]
            file.close()

    def _next_number(self) -> int:
        with self._guard:
            self._number += 1
            return self._number

    def _write(self, kind: str, number: int, row: LedgerRow | CapacityRow) -> None:
        line = orjson.dumps([kind, number, row]) + b"\n"
        with self._guard:
            if number in self._running and kind == SETTLED:
                self._running.discard(number)  # its room was kept when it was accepted
            else:
                settlement = ROW_BYTES if kind == ACCEPTED else 0
                self._make_room(SEGMENT_BYTES - self._used_bytes, len(line) + settlement)
            if kind == ACCEPTED:
                self._running.add(number)
            if self._used_bytes + len(line) > SEGMENT_BYTES:
                self._next_file()
            assert self._file is not None, "bug: no file although there is room"
            self._file[self._used_bytes : self._used_bytes + len(line)] = line
            self._used_bytes += len(line)
            self.pending += 1

    def _has_room(self, left: int, spares: int, more: int) -> bool:
        """`left` bytes of a file and `spares` whole ones hold the settlement of what runs, and `more` bytes."""
        # the end of a file may be too short for the next line
        usable = max(0, left - ROW_BYTES) + spares * (SEGMENT_BYTES - ROW_BYTES)
        return usable >= more + ROW_BYTES * len(self._running)

    def _make_room(self, left: int, more: int) -> None:
        """Allocate files until there is room. Raises OSError if the disk is full."""
        while not self._has_room(left, len(self._spares), more):
            self._spares.append(self._open())

    def _rotate(self) -> OSError | None:
        """Close the current file, so that it can be shipped; or the error if the disk has no room for the next one."""
        with self._guard:
            if self._file is not None and self._used_bytes:
                try:
                    self._make_room(0, 1)
                except OSError as error:
                    return error
                self._next_file()
            while self._spares and self._has_room(SEGMENT_BYTES - self._used_bytes, len(self._spares) - 1, 0):
                path, file = self._spares.pop()
                file.close()
                path.unlink(missing_ok=True)
            return None

    def _next_file(self) -> None:
        """Raises OSError if there is none and no room for one, and the current one stays."""
        path, file = self._spares.pop(0) if self._spares else self._open()
        if self._file is not None:
            self._closed.append((self._path, self._file))
        self._path, self._file, self._used_bytes = path, file, 0

    def _open(self) -> tuple[Path, mmap.mmap]:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock_path = _lock_path(self._directory, self.id)
        if self._lock is None or not lock_path.exists():  # it may have been deleted
            self._lock = _create_locked(lock_path)
        path = _segment_path(self._directory, self.id, self._segments)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            mapped = map_allocated(file, SEGMENT_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
        self._segments += 1
        return path, mapped


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
    segments = [read(path, path.read_bytes(), log_id) for path in sorted(directory.glob(f"{log_id}-*.jsonl"))]
    settled = {row["number"] for segment in segments for row in segment.requests}
    lost = 0
    for segment in segments:
        lost_rows = [row for number, row in segment.accepted.items() if number not in settled]
        segment.requests += lost_rows
        lost += len(lost_rows)
        record(ledger, segment)
    for segment in segments:
        segment.path.unlink(missing_ok=True)
    return lost


def _create_locked(path: Path) -> int:
    """Create a lock file and lock it; again if another replica took it for a dead one and deleted it in between."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        os.close(file)


def _lock_path(directory: Path, log_id: str) -> Path:
    return directory / f"{log_id}.lock"


def _segment_path(directory: Path, log_id: str, index: int) -> Path:
    return directory / f"{log_id}-{index:08d}.jsonl"
