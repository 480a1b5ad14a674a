"""What glibc keeps, in a process of its own: its settings are read at start."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import psutil, time
from service.engine.memory import Trimmer

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
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2)}  # as it becomes by itself once large blocks were freed
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **keeps}, capture_output=True, text=True, check=True
    )
    before, kept, after = (int(word) for word in ended.stdout.split())
    assert kept >= before + 150
    assert after <= before + 50
