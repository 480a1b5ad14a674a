"""Freed memory goes back to the system: glibc keeps what was a whole queue of request bodies for the next ones."""

from __future__ import annotations

import ctypes
import threading

EVERY_S = 10.0


def trim() -> None:
    """All whole pages of this process that are free. Does nothing where the C library has no malloc_trim (musl)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)  # without the interpreter's lock; of each heap it holds that heap's own


class Trimmer:
    """Trims every ten seconds, on a thread of its own.

    Not with a smaller threshold for mmap instead: every large body and every large tensor would then be new pages,
    whose first touch costs more than what is seldom trimmed.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            trim()
