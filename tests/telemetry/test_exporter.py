"""One scrape for all processes of a node: merged, the gauges of the dead left out, handed over when a holder goes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from service.telemetry import exporter

REPLICA = """
import sys
from pathlib import Path
from service.errors import Kind
from service.telemetry.metric_files import share_files
from service.telemetry.metrics import Metrics
share_files(Path(sys.argv[1]))
metrics = Metrics()
metrics.refused("attention", Kind.INVALID)
metrics.queue_predicted_seconds.set(3.0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replica(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", REPLICA, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()


def sample(text: str, name: str) -> float | None:
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(name)), None)


def test_counters_of_living_and_dead_processes_add_up_and_dead_gauges_go(tmp_path: Path) -> None:
    rejections = 'farsight_rejections_total{reason="invalid"}'
    first, second = replica(tmp_path), replica(tmp_path)
    text = exporter.text(tmp_path).decode()
    assert sample(text, rejections) == 2
    assert sample(text, "farsight_queue_predicted_seconds") == 6
    end(first)
    text = exporter.text(tmp_path).decode()
    assert sample(text, rejections) == 2
    assert sample(text, "farsight_queue_predicted_seconds") == 3
    end(second)
    text = exporter.text(tmp_path).decode()
    assert sample(text, rejections) == 2
    assert sample(text, "farsight_queue_predicted_seconds") is None


def test_another_exporter_takes_the_port_over(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "TAKEOVER_INTERVAL_S", 0.05)
    process = replica(tmp_path)

    def scrape() -> str:
        deadline = time.monotonic() + 5
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    return str(answer.read().decode())
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    holder = exporter.Exporter("127.0.0.1", port, tmp_path)
    assert "farsight_rejections_total" in scrape()
    heir = exporter.Exporter("127.0.0.1", port, tmp_path)
    holder.stop()
    assert "farsight_rejections_total" in scrape()
    heir.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)
    end(process)
