"""What is learned of predictions that are wrong."""

from __future__ import annotations

import pytest

from service.engine.pace import Pace


def test_the_factor_follows_what_ran() -> None:
    pace = Pace()
    assert pace.factor == 1.0
    for _ in range(1000):
        pace.learn(0.1, 0.25)
    assert pace.factor == pytest.approx(2.5, rel=0.2)
    for _ in range(1000):
        pace.learn(0.1, 0.05)
    assert pace.factor == pytest.approx(0.5, rel=0.2)


def test_one_strange_run_does_not_rule() -> None:
    pace = Pace()
    pace.learn(0.001, 0.1)
    assert pace.factor < 1.2
    pace.learn(0.001, 1000.0)
    assert pace.factor == 8.0
