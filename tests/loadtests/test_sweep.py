"""The search for the knee, against services whose knee is known."""

from __future__ import annotations

import pytest

from loadtests.samples import Outcome
from loadtests.sweep import EXACT_TO, Step, judged, knee, next_scale, sweep
from loadtests.thresholds import Limits
from tests.loadtests.common import SLO_S, run, sample


def measured(scale: float, capacity: float) -> Step:
    """100 requests x scale; what is over the capacity comes late."""
    count = round(100 * scale)
    good = min(count, round(100 * capacity))
    samples = [sample(latency_s=0.1)] * good + [sample(latency_s=5.0)] * (count - good)
    return judged(run(samples, scale=scale), Limits(), SLO_S)


@pytest.mark.parametrize("capacity", [0.3, 0.99, 1.0, 3.3, 12.0])
def test_the_knee_is_found_from_below_and_from_above(capacity: float) -> None:
    steps = list(sweep(lambda scale: measured(scale, capacity), first=1.0, limit=20))
    found = knee(steps)
    assert found is not None
    assert capacity / EXACT_TO <= found.scale <= capacity / 0.94  # 95 % in time are enough
    assert len(steps) <= 11


def test_a_service_that_sustains_nothing_has_no_knee() -> None:
    steps = list(sweep(lambda scale: measured(scale, 0.0), first=1.0, limit=20))
    assert knee(steps) is None
    assert 5 <= len(steps) <= 9


def test_steps_end() -> None:
    steps = list(sweep(lambda scale: measured(scale, 1e9), first=0.01, limit=4))
    assert len(steps) == 4
    assert knee(steps) is None  # it lies above them


def test_a_lucky_step_above_an_unlucky_one_ends_the_search_and_is_no_knee() -> None:
    steps = [measured(1.0, 0.5), measured(1.2, 2.0)]
    assert [step.sustained for step in steps] == [False, True]
    assert next_scale(steps) is None
    assert knee(steps) is None


def test_a_step_is_judged_by_the_lengths_that_were_offered() -> None:
    limits = Limits(p99_s={"512": 1.0, "32768": 5.0, "262144": 60.0}, goodput=0.5)
    rare = [sample(latency_s=0.1)] * 99 + [sample(latency_s=7.0, length=20_000)]
    assert judged(run(rare), limits, SLO_S).missed == ("p99_s, length 32768 7 <= 5",)
    assert judged(run(rare[:99]), limits, SLO_S).sustained
    unanswered = [sample(latency_s=0.1)] * 99 + [sample(outcome=Outcome.REFUSED, length=200_000)]
    assert judged(run(unanswered), limits, SLO_S).missed == ("p99_s, length 262144 nan <= 60",)
    late = [sample(latency_s=0.9)] * 6 + [sample(latency_s=0.1)] * 94
    assert judged(run(late), limits, SLO_S).missed == ("goodput 0.94 >= 0.95",)
