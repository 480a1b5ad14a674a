"""The search for the knee, against services whose knee is known."""

from __future__ import annotations

import pytest

from loadtests.run import Run
from loadtests.sweep import EXACT_TO, Point, knee, next_scale, sweep
from tests.loadtests.common import SLO_S, run, sample


def measured(scale: float, capacity: float) -> Run:
    """100 requests x scale; what is over the capacity comes late."""
    count = round(100 * scale)
    good = min(count, round(100 * capacity))
    samples = [sample(latency_s=0.1)] * good + [sample(latency_s=5.0)] * (count - good)
    return run(samples, scale=scale)


@pytest.mark.parametrize("capacity", [0.3, 0.99, 1.0, 3.3, 12.0])
def test_the_knee_is_found_from_below_and_from_above(capacity: float) -> None:
    runs = list(sweep(lambda scale: measured(scale, capacity), SLO_S, first=1.0, most=20))
    found = knee(runs, SLO_S)
    assert found is not None
    assert capacity / EXACT_TO <= found.options.scale <= capacity / 0.94  # 95 % in time are enough
    assert len(runs) <= 11


def test_a_service_that_sustains_nothing_has_no_knee() -> None:
    runs = list(sweep(lambda scale: measured(scale, 0.0), SLO_S, first=1.0, most=20))
    assert knee(runs, SLO_S) is None
    assert 5 <= len(runs) <= 9


def test_steps_end() -> None:
    assert len(list(sweep(lambda scale: measured(scale, 1e9), SLO_S, first=0.01, most=4))) == 4


def test_a_lucky_step_above_an_unlucky_one_ends_the_search_and_is_no_knee() -> None:
    assert next_scale([Point(1.0, sustained=False), Point(1.2, sustained=True)]) is None
    assert knee([measured(1.0, 0.5), run([sample()], scale=1.2)], SLO_S) is None
