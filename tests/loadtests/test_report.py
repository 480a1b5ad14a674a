"""Samples as lines, the report in words, and the summary as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests import samples
from loadtests.report import client, reasons, rows, service, summary, text
from loadtests.samples import NO_PLAN, Outcome, Sent
from loadtests.thresholds import Limits, judge
from tests.loadtests.common import SLO_S, run, sample

HEADERS = {
    "x-attention-plan": "sparse",
    "x-queue-seconds": "0.125",
    "x-device-seconds": "0.250000",
    "x-cost-usd": "7.000e-06",
}
SENT = Sent("attention", 100, 1.0, 1.25, "shop")


def test_a_sample_has_the_headers_of_the_answer_and_counts_from_when_it_was_due() -> None:
    sample = SENT.answered(3.0, HEADERS)
    assert (sample.plan, sample.queue_s, sample.device_s, sample.cost_usd, sample.tenant) == (
        "sparse",
        0.125,
        0.25,
        7e-6,
        "shop",
    )
    assert sample.latency_s == 2.0  # and not 1.75


@pytest.mark.parametrize("headers", [{}, {**HEADERS, "x-device-seconds": "soon"}])
def test_an_answer_without_its_headers_is_a_failure(headers: dict[str, str]) -> None:
    assert SENT.answered(3.0, headers).outcome is Outcome.FAILED


def test_samples_survive_writing_and_reading(tmp_path: Path) -> None:
    kept = [SENT.answered(1.123456789012345, HEADERS), SENT.refused(2.0), SENT.failed(3.0, 'no "way"\n')]
    samples.write(tmp_path / "samples.ndjson", kept)
    assert samples.read(tmp_path / "samples.ndjson") == kept


def test_rows_are_separate_by_bucket_and_plan_and_in_order() -> None:
    found = rows(
        [
            sample(latency_s=0.1),
            sample(latency_s=0.3, length=200),
            sample(length=5000, plan="sparse"),
            sample(length=5000),
            sample(length=600, outcome=Outcome.REFUSED),
        ]
    )
    assert [row[1:6] for row in found] == [
        ("1 to 512", "dense", "2", "0", "0"),
        ("513 to 4,096", NO_PLAN, "0", "1", "0"),
        ("4,097 to 32,768", "dense", "1", "0", "0"),
        ("4,097 to 32,768", "sparse", "1", "0", "0"),
    ]
    assert found[0][6:] == ("100.00", "300.00", "300.00", "0.500")
    assert found[1][6:9] == ("-", "-", "-")


def test_the_text_has_totals_failures_and_verdicts() -> None:
    made = run([*[sample(at) for at in range(8)], sample(9.0, outcome=Outcome.FAILED, reason="500 no")])
    report = text(made, judge(made.samples, Limits(goodput=0.5), SLO_S), SLO_S)
    assert "9 requests in 10 s, 0.90/s: 8 answered, 0.80/s of them in time; 0 refused, 1 failed" in report
    assert "device 2.000 s" in report
    assert "client: 0.25 cores, 0.0 ms late" in report
    assert "failed 1x: 500 no" in report
    assert "ok     goodput" in report
    assert "MISSED failed" in report


def test_reasons_are_counted_and_few() -> None:
    made = [sample(outcome=Outcome.FAILED, reason=f"{number % 7}") for number in range(20)]
    assert reasons(made)[0] == ("0", 3)
    assert len(reasons(made)) == 5


def test_the_summary_is_one_line_of_json_without_nan() -> None:
    made = run([sample(tenant="a"), sample(1.0, length=600, tenant="b", outcome=Outcome.REFUSED)])
    line = json.dumps(summary(made, judge(made.samples, Limits(refused=0.0), SLO_S), SLO_S), allow_nan=False)
    assert "\n" not in line
    summary_read = json.loads(line)
    assert summary_read["passed"] is False
    assert (summary_read["offered_per_s"], summary_read["goodput_per_s"]) == (0.2, 0.1)
    assert summary_read["by_length"]["4096"]["p99_s"] is None
    assert summary_read["by_tenant"]["a"]["good"] == 1
    assert summary_read["plans"] == {"dense": 1}


def test_figures_of_the_service_skip_unknown_readings() -> None:
    made = run([sample()])
    assert client(made) == {"cores_mean": 0.25, "cores_max": 0.25, "late_p50_s": 0.0, "late_p99_s": 0.0}
    assert service(made) == {
        "cores_mean": 1.5,
        "queue_max_s": 6.0,  # after the last request was due, too
        "resident_max_bytes": 6e8,
        "resident_growth": 0.0,
        "requests_per_batch": 2.0,
    }


def test_importing_the_helpers_patches_nothing() -> None:
    code = (
        "import socket, sys; before = socket.socket\n"
        "import loadtests.command\n"
        "assert socket.socket is before\n"
        "assert not {'gevent', 'locust', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
