"""Freed memory returns to the system, and nothing unused is kept alive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass

from service.core.options import Priority
from service.scheduling.device_loop import DeviceLoop
from service.scheduling.device_thread import DeviceThread, DeviceWork
from service.scheduling.scheduler import Scheduler

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


class Request:
    """Something that waits and carries something."""

    key, priority, tenant = "attention", Priority.INTERACTIVE, "default"
    predicted_s = arrived_s = 0.001
    shared_s, peak_bytes = 0.0, 0


@dataclass(frozen=True)
class Used:
    used_s: float = 0.001


def test_an_idle_device_holds_no_batch() -> None:
    request = Request()
    gone = threading.Event()
    weakref.finalize(request, gone.set)
    loop: DeviceLoop[Request] = DeviceLoop(Scheduler(0.2), 0.0)
    work: DeviceWork[Request, Used] = DeviceWork(
        run=lambda batch, yield_hook: Used(),
        on_started=lambda batch: None,
        on_finished=lambda batch, outcome: None,
        on_death=lambda: None,
    )
    thread = DeviceThread(loop, time.perf_counter, work)
    try:
        thread.submit(request)
        del request
        assert gone.wait(10)
    finally:
        thread.stop()
