"""Counts outlive their processes: killed ones, killed folds, and scrapes at the same time. All processes are real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.telemetry import exporter
from tests.telemetry.test_exporter import sample

WORKER = """
import sys
from pathlib import Path
from service.telemetry.metric_files import share_files
share_files(Path(sys.argv[1]))
from service.errors import Kind
from service.telemetry.metrics import Metrics
metrics = Metrics()
metrics.budget_used("default", "day", float(sys.argv[3]))
for _ in range(int(sys.argv[2])):
    metrics.failed("attention", "attention", Kind.INVALID, 0.3)
print("ready", flush=True)
sys.stdin.read()
"""
# dies by SIGKILL just before its n-th change of the folder
KILLED_FOLD = """
import os, signal, sys
from pathlib import Path
from service.telemetry import exporter
left = int(sys.argv[2])
def counted(change):
    def changed(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return change(*arguments, **options)
    return changed
for name in ("unlink", "rename", "mkdir"):
    setattr(Path, name, counted(getattr(Path, name)))
exporter.text(Path(sys.argv[1]))
"""
REJECTIONS = 'farsight_rejections_total{reason="invalid"}'
LABELS = 'endpoint="attention",length="unknown",model="attention"'


def start(directory: Path, count: int, used: float = 0.5) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(directory), str(count), str(used)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def counted(directory: Path) -> dict[str, float | None]:
    """The same requests by a counter and by a histogram's bucket, count and sum."""
    text = exporter.text(directory).decode()
    name = "farsight_request_duration_seconds"
    return {
        "counter": sample(text, REJECTIONS),
        "bucket": sample(text, f'{name}_bucket{{endpoint="attention",le="0.5",length="unknown",model="attention"}}'),
        "under": sample(text, f'{name}_bucket{{endpoint="attention",le="0.25",length="unknown",model="attention"}}'),
        "count": sample(text, f"{name}_count{{{LABELS}}}"),
        "sum": sample(text, f"{name}_sum{{{LABELS}}}"),
    }


def expected(count: int) -> dict[str, float]:
    figures = {"counter": count, "bucket": count, "under": 0, "count": count, "sum": 0.3 * count}
    return {name: pytest.approx(value) for name, value in figures.items()}


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_restarts_neither_lose_counts_nor_grow_the_folder(tmp_path: Path) -> None:
    stays = start(tmp_path, 1)
    sizes = []
    for restarts in range(1, 5):
        process = start(tmp_path, 10)
        assert counted(tmp_path) == expected(1 + 10 * restarts)
        kill(process)
        assert counted(tmp_path) == expected(1 + 10 * restarts)
        sizes.append((len(names(tmp_path)), sum(path.stat().st_size for path in tmp_path.rglob("*.db"))))
    assert len(set(sizes)) == 1, sizes
    archived = [name for name in names(tmp_path) if name.startswith("archive")]
    assert len(archived) == 2, archived
    kill(stays)
    assert counted(tmp_path) == expected(41)
    assert sorted(names(tmp_path)) == [*[name for name in names(tmp_path) if name.startswith("archive")], "lock"]


def test_what_a_dead_process_held_or_knew_of_budgets_goes_with_it(tmp_path: Path) -> None:
    ratio = 'farsight_budget_used_ratio{budget="day",tenant="default"}'
    process = start(tmp_path, 1, 0.9)
    assert sample(exporter.text(tmp_path).decode(), ratio) == 0.9
    kill(process)
    text = exporter.text(tmp_path).decode()
    assert sample(text, ratio) is None  # the budget refills, and no process would report it
    assert sample(text, "farsight_resident_memory_bytes") is None


def test_a_fold_killed_at_any_of_its_steps_counts_everything_once(tmp_path: Path) -> None:
    whole = tmp_path / "whole"  # an archive, and two files that it must take in
    kill(start(whole, 3))
    assert counted(whole) == expected(3)
    for _ in range(2):
        kill(start(whole, 10))
    for step in range(100):
        directory = tmp_path / str(step)
        shutil.copytree(whole, directory)
        fold = subprocess.run([sys.executable, "-c", KILLED_FOLD, str(directory), str(step)], check=False)
        assert counted(directory) == expected(23)
        if fold.returncode == 0:  # that many steps a fold has not
            break
        assert fold.returncode == -signal.SIGKILL
    assert step > 20


def test_scrapes_at_the_same_time_never_see_a_counter_go_back(tmp_path: Path) -> None:
    stopped = threading.Event()
    seen: list[list[float]] = [[], []]

    def scrape(into: list[float]) -> None:
        while not stopped.is_set():
            into.append(counted(tmp_path)["count"] or 0.0)

    kill(start(tmp_path, 1))
    threads = [threading.Thread(target=scrape, args=(into,)) for into in seen]
    for thread in threads:
        thread.start()
    for _ in range(3):
        several = [start(tmp_path, 5), start(tmp_path, 5)]
        for process in several:
            kill(process)
    stopped.set()
    for thread in threads:
        thread.join()
    for values in seen:
        assert values == sorted(values)
        assert len(values) > 3
    assert counted(tmp_path) == expected(31)


def test_an_ended_process_is_ended_even_if_its_pid_is_reused(tmp_path: Path) -> None:
    """No file is named after a pid; files of an earlier version that are belong to no running process."""
    process = start(tmp_path, 10)
    assert not [name for name in names(tmp_path) if str(process.pid) in name]
    kill(process)
    (counters,) = tmp_path.glob("counter_*.db")
    counters.rename(tmp_path / f"counter_{os.getpid()}.db")
    assert counted(tmp_path) == expected(10)
    assert not list(tmp_path.glob("*.db"))
