"""The report against samples counted by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from loadtests.report import NO_PLAN, Outcome, Report, Sample, answered, bucket_name, bucket_of, percentile

HEADERS = {"x-attention-plan": "dense", "x-device-seconds": "0.250000", "x-cost-usd": "7.000e-06"}


def filled(*samples: Sample) -> Report:
    report = Report()
    for sample in samples:
        report.sent += 1
        report.add(sample)
    return report


def test_percentiles_are_latencies_that_were_seen() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(hundred, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert [percentile([0.123456, 7.0], p) for p in (50, 95)] == [0.123456, 7.0]
    assert percentile([3.0], 1) == percentile([3.0], 99) == 3.0
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, 1), (3, 1), (4, 4), (63, 16), (64, 64), (255, 64), (256, 256), (8191, 4096), (8192, 4096)],
)
def test_buckets_are_powers_of_four(length: int, bucket: int) -> None:
    assert bucket_of(length) == bucket
    low, high = map(int, bucket_name(bucket).split("-"))
    assert low <= length <= high


def test_rows_are_apart_by_endpoint_bucket_and_plan_and_in_order() -> None:
    samples = [
        answered("a", 100, 0.0, 0.1, HEADERS),
        answered("a", 200, 1.0, 1.3, HEADERS),
        answered("a", 5000, 1.0, 2.0, {**HEADERS, "x-attention-plan": "sparse"}),
        answered("a", 5000, 1.0, 4.0, HEADERS),
        answered("b", 100, 1.0, 3.0, HEADERS),
    ]
    rows = filled(*samples).rows()
    assert [(row.endpoint, row.bucket, row.plan, row.answered) for row in rows] == [
        ("a", 64, "dense", 2),
        ("a", 4096, "dense", 1),
        ("a", 4096, "sparse", 1),
        ("b", 64, "dense", 1),
    ]
    assert rows[0].p50_s == pytest.approx(0.1)
    assert rows[0].p99_s == pytest.approx(0.3)
    assert rows[0].device_s == pytest.approx(0.5)


def test_refused_and_failed_are_counted_apart_and_have_no_latency() -> None:
    report = filled(
        answered("a", 100, 0.0, 0.5, HEADERS),
        Sample("a", 100, Outcome.REFUSED, 0.0, 9.0),
        Sample("a", 100, Outcome.FAILED, 0.0, 9.0, reason="500 no"),
    )
    answers, rest = sorted(report.rows(), key=lambda row: row.plan, reverse=True)
    assert (rest.plan, rest.answered, rest.refused, rest.failed) == (NO_PLAN, 0, 1, 1)
    assert (answers.answered, answers.p99_s) == (1, 0.5)
    assert math.isnan(rest.p50_s)
    assert "failed 1x: 500 no" in report.text()


def test_totals_are_those_of_the_answers() -> None:
    report = filled(*(answered("a", 100, 0.25 * at, 0.25 * at + 0.25, HEADERS) for at in range(8)))
    report.sent += 3
    text = report.text()
    assert "8 answers in 2.0 s: 4.00 requests/s; 0 refused, 0 failed, 3 cut off" in text
    assert "device 2.000 s, cost 5.600e-05 USD" in text


def test_the_exit_code_fails_on_failures_and_on_nothing() -> None:
    good = answered("a", 100, 0.0, 0.1, HEADERS)
    refused = Sample("a", 100, Outcome.REFUSED, 0.0, 0.1)
    failed = Sample("a", 100, Outcome.FAILED, 0.0, 0.1)
    assert filled().exit_code == 1
    assert filled(refused).exit_code == 1
    assert filled(good).exit_code == 0
    assert filled(good, refused).exit_code == 0
    assert filled(good, failed).exit_code == 1
    assert "0 answers in 0.0 s" in filled().text()


@pytest.mark.parametrize("headers", [{}, {**HEADERS, "x-device-seconds": "soon"}])
def test_an_answer_without_its_headers_is_a_failure(headers: dict[str, str]) -> None:
    assert answered("a", 100, 0.0, 0.1, headers).outcome is Outcome.FAILED


def test_importing_the_helpers_patches_nothing() -> None:
    code = (
        "import socket, sys; before = socket.socket\n"
        "import loadtests.payloads, loadtests.report\n"
        "assert socket.socket is before\n"
        "assert not {'gevent', 'locust', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
