"""The device thread: all device work of a replica runs here, one batch at a time, never on the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import torch

Result = TypeVar("Result")


def pick_device(wanted: str) -> torch.device:
    """ "auto" takes the GPU where there is one; "cuda" without one is an error, not a silent CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Executor:
    """Runs callables one after another on a thread of its own."""

    def __init__(self, cpu_threads: int) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._cpu_threads = cpu_threads
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue `task`; it must hand its own result and errors over, nothing is caught here."""
        self._tasks.put(task)

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)
        while (task := self._tasks.get()) is not None:
            task()


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own type, Python's, or the CPU allocator's RuntimeError (which has no type of its own)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def clear_memory(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU; on a CPU nothing is left running."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What `work` returns and the seconds that the device took for it."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start
