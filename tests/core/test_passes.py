"""How a batch is divided into passes, by examples and properties."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.passes import split_by_shape, split_by_tokens


def test_batches_of_equal_shape() -> None:
    shapes = [(3, 0), (2, 1), (3, 0), (3, 0), (2, 1)]
    assert split_by_shape(shapes, 6) == [[0, 2], [3], [1, 4]]
    assert split_by_shape(shapes, 1) == [[0], [2], [3], [1], [4]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(1, 100))
def test_runs_cover_everything_in_order_within_the_limit(lengths: list[int], limit: int) -> None:
    runs = split_by_tokens(lengths, limit)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) == 1 or sum(lengths[index] for index in run) <= limit
