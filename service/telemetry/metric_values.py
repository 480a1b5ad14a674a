"""Values of this process's metrics, in files of prometheus_client's format; in memory while the disk has no room.

prometheus_client would map files whose blocks are not allocated yet, and a full disk would kill the process.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from service.disk import is_full, map_allocated

logger = logging.getLogger("farsight")

INITIAL_BYTES = 1 << 16
CHECK_S = 1.0  # until a full disk is tried again
HEADER_BYTES = 8  # bytes in use, then padding
_LENGTH, _VALUE = struct.Struct("i"), struct.Struct("dd")


def entry(key: str, value: float, at_s: float) -> bytes:
    """One series as it is in a file: length and text of its key, padded to 8 bytes, then value and time."""
    text = key.encode()
    return _LENGTH.pack(len(text)) + text + b" " * (8 - (len(text) + 4) % 8) + _VALUE.pack(value, at_s)


def document(entries: bytes) -> bytes:
    """A whole file."""
    return _LENGTH.pack(HEADER_BYTES + len(entries)).ljust(HEADER_BYTES, b"\0") + entries


class _File:
    """The values of one kind of metric. Written under the lock of `ProcessFiles`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._map: mmap.mmap | None = None
        self._used = HEADER_BYTES
        self._positions: dict[str, int] = {}
        self.waiting: dict[str, tuple[float, float]] = {}  # by series that have no place in the file yet

    def write(self, key: str, value: float, at_s: float) -> None:
        position = self._positions.get(key)
        if position is None or self._map is None:
            self.waiting[key] = value, at_s
        else:
            self._map[position : position + _VALUE.size] = _VALUE.pack(value, at_s)

    def place(self) -> None:
        """Give every waiting series its place in the file. Raises OSError if the disk has no room."""
        for key, (value, at_s) in tuple(self.waiting.items()):
            line = entry(key, value, at_s)
            end = self._used + len(line)
            if self._map is None or end > len(self._map):
                self._map = self._grown(end)
            self._map[self._used : end] = line
            self._map[: _LENGTH.size] = _LENGTH.pack(end)  # last: a reader sees whole entries
            self._positions[key], self._used = end - _VALUE.size, end
            del self.waiting[key]

    def leave(self) -> None:
        """Have all values wait for a new file: this one was deleted."""
        if self._map is None or self._file is None:
            return
        for key, position in self._positions.items():
            self.waiting[key] = _VALUE.unpack_from(self._map, position)
        os.close(self._file)
        self._file, self._map, self._used = None, None, HEADER_BYTES
        self._positions.clear()

    def _grown(self, end: int) -> mmap.mmap:
        size = INITIAL_BYTES if self._map is None else len(self._map)
        while size < end:
            size *= 2
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        return map_allocated(self._file, size)


class ProcessFiles:
    """The files of one process in a directory, named by an id that is used only once."""

    def __init__(self, directory: Path, locked: Callable[[Path], Any]) -> None:
        """`locked`: holds the lock of a directory. Raises OSError if files cannot be made, unless the disk is full."""
        self._directory, self._locked = directory, locked
        self._process = uuid4().hex
        self._alive_path = directory / f"{self._process}.alive"
        self._files: dict[str, _File] = {}
        self._alive: int | None = None
        self.guard = threading.Lock()
        self._is_waiting = False  # for room on the disk
        with self.guard:
            try:
                self._place()
            except OSError as error:
                if not is_full(error):
                    raise
                self._wait(error)
        threading.Thread(target=self._keep, name="metric files", daemon=True).start()

    def add(self, prefix: str, key: str) -> _File:
        """The file of a new series, which is 0."""
        with self.guard:
            file = self._files.get(prefix)
            if file is None:
                file = self._files[prefix] = _File(self._directory / f"{prefix}_{self._process}.db")
            file.write(key, 0.0, 0.0)
            if not self._is_waiting:
                try:
                    self._place()
                except OSError as error:
                    self._wait(error)
            return file

    def _wait(self, error: OSError) -> None:
        self._is_waiting = True
        logger.error("metrics are kept in memory until they can be written: %s", error)

    def _place(self) -> None:
        """Raises OSError if the disk has no room."""
        if self._alive is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._locked(self._directory):  # no other process checks the new file before it is locked
                self._alive = os.open(self._alive_path, os.O_CREAT | os.O_WRONLY, 0o600)
                fcntl.flock(self._alive, fcntl.LOCK_EX)  # until this process ends
        for file in self._files.values():
            file.place()

    def _keep(self) -> None:
        """Write what waits once there is room, and everything again if the files were deleted."""
        while True:
            time.sleep(CHECK_S)
            with self.guard:
                if self._alive is not None and not self._alive_path.exists():
                    self._leave()
                if not self._is_waiting:
                    continue
                try:
                    self._place()
                except OSError as error:
                    if not is_full(error):
                        logger.error("metrics are still kept in memory: %s", error)
                else:
                    self._is_waiting = False
                    logger.warning("metrics are written again")

    def _leave(self) -> None:
        assert self._alive is not None, "bug: nothing to leave"
        os.close(self._alive)
        self._alive = None
        for file in self._files.values():
            file.leave()
        self._is_waiting = True
        logger.error("the metric files of this process were deleted")


def value_class(files: ProcessFiles) -> type:
    """A class for prometheus_client's `values.ValueClass`, which makes one object for each number of a metric."""
    guard = files.guard

    class Value:
        def __init__(self, kind: str, metric: str, name: str, *described: Any, multiprocess_mode: str = "") -> None:
            label_names, label_values, help_text = described
            labels = dict(zip(label_names, label_values, strict=True))
            self._key = json.dumps([metric, name, labels, help_text], sort_keys=True)
            self._value = 0.0
            self._file = files.add(f"{kind}_{multiprocess_mode}" if multiprocess_mode else kind, self._key)

        def inc(self, amount: float) -> None:
            with guard:
                self._value += amount
                self._file.write(self._key, self._value, 0.0)

        def set(self, value: float, timestamp: float | None = None) -> None:
            with guard:
                self._value = value
                self._file.write(self._key, value, timestamp or 0.0)

        def get(self) -> float:
            return self._value

        def set_exemplar(self, exemplar: object) -> None:
            """Files have no place for exemplars."""

        def get_exemplar(self) -> None:
            """See `set_exemplar`."""

    return Value
