"""The arithmetic, against samples counted by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from loadtests.figures import Totals, bucket_of, by_bucket, by_load, growth, in_flight, percentile, windows
from loadtests.samples import Outcome
from tests.loadtests.common import SLO_S, sample


def test_percentiles_are_measured_latencies() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(reversed(hundred), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert [percentile([7.0, 0.123456], p) for p in (50, 95)] == [0.123456, 7.0]
    assert percentile([3.0], 1) == percentile([3.0], 99) == 3.0
    assert math.isnan(percentile([], 50))


def test_buckets_are_those_of_the_metrics() -> None:
    from service.telemetry.metrics import LENGTH_LABELS, LENGTHS

    edges = [(length, length + 1) for length in LENGTHS]
    assert [bucket_of(length) for edge in edges for length in edge] == [
        name for pair in pairwise(LENGTH_LABELS) for name in pair
    ]
    assert list(by_bucket([sample(length=5000), sample(length=1), sample(length=10**6)])) == ["512", "32768", "more"]


def test_goodput_is_what_was_answered_within_the_bound_of_its_length() -> None:
    samples = [
        sample(latency_s=0.5),
        sample(latency_s=0.501),
        sample(latency_s=2.0, length=4096),
        sample(latency_s=0.01, outcome=Outcome.REFUSED),
        sample(latency_s=0.01, outcome=Outcome.FAILED),
    ]
    totals = Totals.of(samples, SLO_S)
    assert (totals.offered, totals.answered, totals.good, totals.refused, totals.failed) == (5, 3, 2, 1, 1)
    assert totals.share("good") == 0.4
    assert totals.p99_s == pytest.approx(2.0)  # neither a refusal nor a failure has a latency
    assert totals.device_s == 0.75
    assert Totals.of(samples[:3], SLO_S).usd_per_1000 == pytest.approx(7e-3)


def test_nothing_has_no_share_and_no_latency() -> None:
    totals = Totals.of([], SLO_S)
    assert totals.share("good") == 0.0
    assert math.isnan(totals.p50_s)
    assert math.isnan(totals.usd_per_1000)


def test_windows_group_requests_by_when_they_were_due_and_include_empty_ones() -> None:
    samples = [sample(0.0, 9.0), sample(4.9), sample(5.0), sample(9.999)]
    parts = windows(samples, 10.0, 2.5)
    assert [at_s for at_s, _ in parts] == [1.25, 3.75, 6.25, 8.75]
    assert [[sample.at_s for sample in part] for _, part in parts] == [[0.0], [4.9], [5.0], [9.999]]
    assert windows([], 10.0, 5.0) == [(2.5, []), (7.5, [])]


def test_load_levels_sort_the_run_by_offered_load() -> None:
    quiet = [sample(at / 10, 0.1) for at in range(0, 100, 5)]  # 2/s for ten seconds
    busy = [sample(10 + at / 100, 0.9) for at in range(1000)]  # 100/s for ten more
    low, high = by_load([*busy, *quiet], 20.0, levels=2)
    assert (low[0], high[0]) == pytest.approx((2.0, 100.0))
    assert {sample.latency_s for sample in low[1]} == {sample.latency_s for sample in quiet}
    assert len(high[1]) == 1000


def test_in_flight_counts_from_when_a_request_was_due() -> None:
    samples = [sample(0.0, 2.0), sample(1.0, 2.0)]
    assert in_flight(samples, [0.0, 0.5, 1.5, 2.5, 3.5]) == [0, 1, 2, 1, 0]


def test_growth_is_from_the_second_quarter_to_the_last() -> None:
    warm = [(0.0, 10.0), (10.0, 90.0), (26.0, 100.0), (30.0, 700.0), (40.0, 100.0), (60.0, 130.0)]
    assert growth([*warm, (80.0, 110.0), (99.0, 110.0), (100.0, 900.0)], 100.0) == pytest.approx(0.1)
    assert growth([*warm, (76.0, 50.0), (77.0, math.nan)], 100.0) == pytest.approx(-0.5)
    assert math.isnan(growth(warm, 100.0))
    assert math.isnan(growth([], 100.0))
