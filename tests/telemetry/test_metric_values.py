"""Metrics on a disk that is full, or was, and in files that were deleted. All processes and disks are real."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.telemetry import exporter, metric_files, metric_values
from tests.disks import Disk, disk
from tests.telemetry.test_exporter import sample

__all__ = ["disk"]

# answers each line with the number of requests that it has counted, of that many models
WORKER = """
import sys
from pathlib import Path
from service.telemetry.metric_files import share_files
share_files(Path(sys.argv[1]))
from service.errors import Kind
from service.telemetry.metrics import Metrics
metrics, models = Metrics(), 0
for line in sys.stdin:
    for _ in range(int(line)):
        metrics.failed("attention", f"model {models}", Kind.INVALID, 0.3)
        models += 1
    print(models, flush=True)
"""
COUNTED = 'farsight_rejections_total{reason="invalid"}'
HEALED_S = 5.0


class Worker:
    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def count(self, models: int) -> int:
        """Requests of that many new models are counted; of all models so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(models, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def scraped(directory: Path) -> tuple[float | None, int]:
    """Requests by one counter, and the series of all models."""
    text = exporter.text(directory).decode()
    return sample(text, COUNTED), text.count("farsight_request_duration_seconds_count{")


def healed(directory: Path, expected: tuple[float | None, int]) -> float:
    """Seconds until a scrape shows everything."""
    started_s = time.monotonic()
    while scraped(directory) != expected:
        assert time.monotonic() - started_s < HEALED_S, scraped(directory)
        time.sleep(0.05)
    return time.monotonic() - started_s


def test_a_full_disk_kills_no_process_and_everything_is_counted_once_it_has_room(disk: Disk) -> None:
    directory = disk.root / "metrics"
    worker = Worker(directory)
    assert worker.count(1) == 1
    disk.fill()
    assert worker.count(2000) == 2001  # much more than what is allocated
    count, models = scraped(directory)
    assert count == 2001  # this series has its place
    assert 1 <= models < 2001
    disk.free()
    healed(directory, (2001, 2001))
    disk.fill()
    assert worker.count(1) == 2002
    worker.kill()
    assert scraped(directory) == (2002, 2002)  # there was a place left; the files cannot be folded now
    assert list(directory.glob("counter_*.db"))
    disk.free()
    assert scraped(directory) == (2002, 2002)
    assert not list(directory.glob("*.db"))


def test_a_process_starts_on_a_full_disk_and_writes_once_it_has_room(disk: Disk) -> None:
    directory = disk.root / "metrics"
    disk.fill()
    worker = Worker(directory)
    assert worker.count(3) == 3
    assert exporter.text(directory).count(b"farsight_") == 0
    disk.free()
    healed(directory, (3, 3))
    worker.kill()


def test_deleted_files_are_written_again(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "metrics"
    worker = Worker(directory)
    assert worker.count(3) == 3
    shutil.rmtree(directory.parent)
    assert worker.count(1) == 4
    healed(directory, (4, 4))
    worker.kill()
    assert scraped(directory) == (4, 4)


def test_a_directory_that_cannot_be_used_at_all_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        metric_values.ProcessFiles(tmp_path / "file" / "metrics", metric_files.locked)
