"""Packing by hand-checked examples."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.models.packing import pack, split_by_tokens


def test_packed_rows() -> None:
    packed = pack([(5, 6, 7), (8,), (9, 10)], torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.segment_ids.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert packed.cu_seqlens == (0, 3, 4, 6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(1, 100))
def test_runs_cover_everything_in_order_within_the_limit(lengths: list[int], limit: int) -> None:
    runs = split_by_tokens(lengths, limit)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    for run in runs:
        assert len(run) == 1 or sum(lengths[index] for index in run) <= limit
