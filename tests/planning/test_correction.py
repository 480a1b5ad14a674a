"""What is learned of predictions that are wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from service.core.plan import Cost, Plan, PlanKind
from service.planning.correction import (
    MOST_KINDS,
    PredictionCorrector,
    octave,
    uncorrected,
)

DENSE = ("dense", "float32"), -3, "form"
SPARSE = ("sparse", "float32"), -3, "form"


def test_nothing_is_corrected_before_anything_ran() -> None:
    assert PredictionCorrector().factor(DENSE) == 1.0


def test_each_kind_of_work_has_its_own_correction() -> None:
    corrector = PredictionCorrector()
    for _ in range(50):
        corrector.learn(DENSE, 0.02, 0.05)
        corrector.learn(SPARSE, 0.02, 0.01)
    assert corrector.factor(DENSE) == pytest.approx(2.5, rel=0.1)
    assert corrector.factor(SPARSE) == pytest.approx(0.5, rel=0.1)


def test_what_never_ran_is_corrected_like_its_relatives() -> None:
    corrector = PredictionCorrector()
    for _ in range(50):
        corrector.learn(DENSE, 0.02, 0.04)
    assert 1.2 < corrector.factor((DENSE[0], -8, "another form")) < corrector.factor(DENSE)


def test_a_slower_machine_slows_all_kinds_and_recovers() -> None:
    corrector = PredictionCorrector()
    for seconds in (0.1, 0.2):
        for _ in range(40):
            corrector.learn(DENSE, 0.1, seconds)
    assert corrector.factor(DENSE) == pytest.approx(2, rel=0.1)
    assert corrector.factor(SPARSE) > 1.2
    for _ in range(60):
        corrector.learn(DENSE, 0.1, 0.1)
    assert corrector.factor(DENSE) == pytest.approx(1, rel=0.1)
    assert corrector.factor(SPARSE) == pytest.approx(1, rel=0.2)


def test_noise_is_averaged_out() -> None:
    draw = random.Random(0)
    corrector = PredictionCorrector()
    for _ in range(300):
        corrector.learn(DENSE, 0.002, 0.003 * draw.lognormvariate(0, 0.3))
    assert corrector.factor(DENSE) == pytest.approx(1.5, rel=0.2)


def test_little_data_and_one_strange_run_do_not_rule() -> None:
    corrector = PredictionCorrector()
    corrector.learn(DENSE, 0.001, 0.002)
    assert 1.0 < corrector.factor(DENSE) < 1.8
    for _ in range(50):
        corrector.learn(DENSE, 0.001, 0.001)
    usual = corrector.factor(DENSE)
    corrector.learn(DENSE, 0.001, 1.0)
    assert corrector.factor(DENSE) < 1.7 * usual


def test_corrections_are_bounded() -> None:
    corrector = PredictionCorrector()
    for _ in range(200):
        corrector.learn(DENSE, 0.001, 1.0)
        corrector.learn(SPARSE, 10.0, 0.001)
    assert corrector.factor(DENSE) == pytest.approx(8.0)
    assert corrector.factor(SPARSE) == pytest.approx(0.25)


def test_what_has_not_run_for_long_may_be_tried_again() -> None:
    corrector = PredictionCorrector()
    for _ in range(50):
        corrector.learn(SPARSE, 0.1, 0.4)
    for _ in range(200):
        corrector.learn(DENSE, 10.0, 10.0)
    assert corrector.factor(SPARSE) == pytest.approx(1.0, rel=0.1)


def test_kinds_do_not_pile_up() -> None:
    corrector = PredictionCorrector()
    for size in range(2 * MOST_KINDS):
        corrector.learn((DENSE[0], size, "form"), 0.001, 0.002)
    assert len(corrector._kinds) <= MOST_KINDS


def test_a_batch_is_compared_as_a_whole() -> None:
    """0.4 s of work each, corrected by 2, of which 0.2 s are paid once."""
    plan = Plan(PlanKind.DENSE, Cost(0, 0, 0, 0), 0.8, "", shared_s=0.4, path=DENSE, correction=2.0)
    assert uncorrected([plan]) == (DENSE, pytest.approx(0.4))
    path, seconds = uncorrected([plan, plan, replace(plan, predicted_s=1.6, shared_s=0.8, correction=4.0)])
    assert seconds == pytest.approx(0.2 + 3 * 0.2)
    assert path[0] == DENSE[0]
    assert path[1:] == (octave(0.8), ("batch", "form"))
