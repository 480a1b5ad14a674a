"""The device that a replica computes on: which one, its memory, its clock, what its errors mean."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

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


class DeviceQueue:
    """What a GPU was given. Bounds how far it may be behind: enqueued work can be neither stopped nor overtaken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        """At a checkpoint: wait until the device has reached the mark before the last."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)
        if len(self._marks) > MARKS_AHEAD:
            self._marks.popleft().synchronize()

    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""
        synchronize(self._device)


def side_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Threads next to the device's, each on one core.

    All are started here, before the device thread sets its own number: MKL has one number of threads per process, the
    last that any thread has set.
    """
    all_started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(count, name, initializer=begin)
    for _ in range(count):
        pool.submit(int)
    all_started.wait()
    return pool


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


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of the GPU, or of the machine within its cgroup."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(current.read()))
    except FileNotFoundError:
        pass  # no cgroup v2 memory controller: the machine's own figure stands
    return max(available, 0)
