"""Packing by examples."""

from __future__ import annotations

import torch

from service.models.inputs.rows import EncodedInput
from service.models.packing import pack


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
