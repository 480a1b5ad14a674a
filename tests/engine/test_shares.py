"""Shares of a batch add up to the batch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.answer import cost_usd
from service.engine.shares import shares


@settings(max_examples=200, deadline=None, derandomize=True)
@given(total_s=st.floats(1e-6, 1e4), flops=st.lists(st.integers(0, 10**15), min_size=1, max_size=64))
def test_shares_add_up(total_s: float, flops: list[int]) -> None:
    parts = shares(total_s, flops)
    assert sum(parts) == pytest.approx(total_s, rel=1e-9)
    assert all(part >= 0 for part in parts)


def test_shares_follow_flops() -> None:
    assert shares(1.0, [1, 3]) == [0.25, 0.75]
    assert shares(1.0, [0, 0]) == [0.5, 0.5]


def test_an_hour_costs_its_price() -> None:
    assert cost_usd(3600, 2.5) == 2.5
