"""Packing by hand-checked examples."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.models.inputs.rows import EncodedInput
from service.models.packing import pack, split_by_shape, split_by_tokens


def test_packed_rows() -> None:
    packed = pack([EncodedInput((5, 6, 7)), EncodedInput((8,)), EncodedInput((9, 10))], torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.type_ids is None
    assert packed.cu_seqlens == (0, 3, 4, 6)


def test_types_of_pairs_and_the_first_position() -> None:
    packed = pack(
        [EncodedInput((5, 6)), EncodedInput((8, 9, 7), types=(0, 1, 1))], torch.device("cpu"), first_position=2
    )
    assert packed.position_ids.tolist() == [[2, 3, 2, 3, 4]]
    assert packed.type_ids is not None
    assert packed.type_ids.tolist() == [[0, 0, 0, 1, 1]]


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
