"""The device thread: all device work of a replica runs here, never on the event loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

logger = logging.getLogger("farsight")

MARKS_AHEAD = 2  # checkpoints that a GPU may be behind


def pick_device(wanted: str) -> torch.device:
    """ "auto" takes the GPU where there is one; "cuda" without one is an error, not a silent CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def device_names(device: torch.device) -> tuple[str, str]:
    """What a price may be given for: the name of a GPU, and its kind."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name, device.type


def side_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Threads beside the device's, each on one core.

    All are started here, before the device thread sets its own number: MKL has one number of threads for the process,
    the last that any thread has set.
    """
    meeting = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        meeting.wait()

    pool = ThreadPoolExecutor(count, name, initializer=begin)
    for _ in range(count):
        pool.submit(int)
    meeting.wait()
    return pool


Task = Callable[[], None]


class Executor:
    """Runs one task after another on a thread of its own; the thread takes the next one itself, the moment it is free.

    `next_task` is called with `condition` held, which guards whatever it reads; None: nothing to do until `wake`.
    Tasks hand over their own results and errors. If one raises nevertheless, the thread ends and `on_death` is called.
    """

    def __init__(self, cpu_threads: int, next_task: Callable[[], Task | None], on_death: Callable[[], None]) -> None:
        self.condition = threading.Condition()
        self._cpu_threads = cpu_threads
        self._next_task, self._on_death = next_task, on_death
        self._stops = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stops

    def wake(self) -> None:
        """There may be work; called with `condition` held."""
        self.condition.notify()

    def stop(self) -> None:
        """Finish what there is to do, then end the thread."""
        with self.condition:
            self._stops = True
            self.condition.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)
        try:
            while (task := self._wait()) is not None:
                task()
                del task  # or its tensors would stay until the next one comes
        except Exception as error:
            logger.critical("the device thread ends", exc_info=error)
        finally:
            self._on_death()

    def _wait(self) -> Task | None:
        with self.condition:
            while (task := self._next_task()) is None and not self._stops:
                self.condition.wait()
            return task


class EnqueuedAhead:
    """Bounds the work that a GPU is given ahead of time: what is enqueued can be neither stopped nor overtaken."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        """At a checkpoint: wait until the device is at the one before the last."""
        if not self._is_cuda:
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)
        if len(self._marks) > MARKS_AHEAD:
            self._marks.popleft().synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own type, Python's, or the CPU allocator's RuntimeError (which has no type of its own)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def is_device_lost(error: BaseException) -> bool:
    """After a CUDA error that is not about memory the context is lost: every later call fails too."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


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
