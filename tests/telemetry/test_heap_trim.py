"""What is free goes back, and nothing is held that nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

from service.scheduling.device_thread import Executor

PROGRAM = """
import psutil, time
from service.telemetry.heap_trim import Trimmer

def resident():
    return psutil.Process().memory_info().rss >> 20

before = resident()
blocks = [bytearray(1024 * 1024) for _ in range(200)]
pins = [bytearray(100_000)]  # above them: what lies below cannot be given back from the end
del blocks
kept = resident()
trimmer = Trimmer(every_s=0.01)
deadline = time.monotonic() + 10
while resident() > before + 50 and time.monotonic() < deadline:
    time.sleep(0.01)
trimmer.stop()
print(before, kept, resident())
"""


def test_freed_memory_goes_back_to_the_system() -> None:
    """In a process of its own: glibc reads its settings at start."""
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2)}  # as it becomes by itself once large blocks were freed
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **keeps}, capture_output=True, text=True, check=True
    )
    before, kept, after = (int(word) for word in ended.stdout.split())
    assert kept >= before + 150
    assert after <= before + 50


class Work:
    """A task that carries something."""

    def __call__(self) -> None:
        """Nothing to do."""


def test_an_idle_device_holds_no_task() -> None:
    work = Work()
    gone = threading.Event()
    weakref.finalize(work, gone.set)
    tasks: list[Callable[[], None]] = [work]
    del work
    executor = Executor(1, lambda: tasks.pop() if tasks else None, lambda: None)
    try:
        assert gone.wait(10)
    finally:
        executor.stop()
