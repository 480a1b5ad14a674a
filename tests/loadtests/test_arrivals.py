"""Arrival processes: their rates, their shapes, their randomness, and that a seed is all they depend on."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from loadtests.arrivals import BURST_FACTOR, EVEN, SHAPES, STEPS, draw

RATE, DURATION_S = 50.0, 400.0


@pytest.mark.parametrize("shape", [*SHAPES, EVEN])
def test_each_has_its_rate_in_the_mean_and_only_its_seed_matters(shape: str) -> None:
    at_s = draw(shape, RATE, DURATION_S, seed=1)
    assert at_s == sorted(at_s)
    assert at_s[0] >= 0
    assert at_s[-1] < DURATION_S
    assert len(at_s) / DURATION_S == pytest.approx(RATE, rel=0.03)  # 4 deviations of a Poisson count
    assert at_s == draw(shape, RATE, DURATION_S, seed=1)
    assert (at_s == draw(shape, RATE, DURATION_S, seed=2)) == (shape == EVEN)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_one_in_the_mean(shape: str) -> None:
    parts = [SHAPES[shape]((index + 0.5) / 12000) for index in range(12000)]
    assert statistics.fmean(parts) == pytest.approx(1.0, abs=1e-3)
    assert min(parts) > 0


def test_poisson_gaps_are_exponential() -> None:
    at_s = draw("poisson", RATE, DURATION_S, seed=3)
    gaps = [b - a for a, b in pairwise(at_s)]
    assert statistics.fmean(gaps) == pytest.approx(1 / RATE, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / RATE, rel=0.03)  # as large as the mean: nothing is corrected


def rate_in(at_s: list[float], begin: float, end: float) -> float:
    """Requests/s between two parts of the run."""
    inside = sum(begin * DURATION_S <= arrival < end * DURATION_S for arrival in at_s)
    return inside / ((end - begin) * DURATION_S)


def test_bursts_have_their_factor_and_their_places() -> None:
    at_s = draw("bursts", RATE, DURATION_S, seed=4)
    quiet, burst = rate_in(at_s, 0, 1 / 6), rate_in(at_s, 1 / 6, 0.25)
    assert burst / quiet == pytest.approx(BURST_FACTOR, rel=0.1)


def test_steps_go_up() -> None:
    at_s = draw("steps", RATE, DURATION_S, seed=5)
    seen = [rate_in(at_s, index / 4, (index + 1) / 4) for index in range(4)]
    assert seen == pytest.approx([RATE * step for step in STEPS], rel=0.1)


def test_a_day_is_busy_at_noon_and_quiet_at_night() -> None:
    at_s = draw("diurnal", RATE, DURATION_S, seed=6)
    night, noon = rate_in(at_s, 0, 0.05), rate_in(at_s, 0.475, 0.525)
    assert noon == pytest.approx(1.8 * RATE, rel=0.1)
    assert night == pytest.approx(0.2 * RATE, rel=0.3)


def test_even_requests_are_equally_far_apart() -> None:
    assert draw(EVEN, 0.125, 32.0, seed=0) == [4.0, 12.0, 20.0, 28.0]
