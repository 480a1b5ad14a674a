"""Returns freed memory to the system; glibc would keep the size of a whole queue of request bodies."""

from __future__ import annotations

import ctypes
import threading

EVERY_S = 10.0


def trim() -> None:
    """Return all free whole pages of this process. Does nothing if the C library has no malloc_trim (musl)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)  # runs without the interpreter's lock; takes each heap's own lock


class Trimmer:
    """Trims every `every_s` seconds on its own thread.

    A smaller mmap threshold is no alternative: every large body and tensor would then be on new pages, whose first
    touch costs more than trimming now and then.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trim", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop trimming and join the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            trim()
