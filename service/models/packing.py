"""Sequences of different lengths in one `[1, T]` row, without padding; tokens attend within their own sequence only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from service.models.inputs.rows import EncodedInput


@dataclass(frozen=True, slots=True)
class Packed:
    """Arguments of one packed pass over S sequences of T tokens together."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    type_ids: torch.Tensor | None  # [1, T] int64; None if no sequence is a pair
    cu_seqlens: tuple[int, ...]  # S + 1 offsets into T


def pack(rows: Sequence[EncodedInput], device: torch.device, first_position: int = 0) -> Packed:
    """S rows, none of them empty -> one row of T tokens. Positions start at `first_position` in each sequence."""
    lengths = [len(row.ids) for row in rows]
    assert all(lengths), "bug: an empty sequence cannot be packed"
    cu_seqlens = (0, *accumulate(lengths))
    positions = torch.cat([torch.arange(first_position, first_position + length) for length in lengths])
    input_ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)))
    type_ids: torch.Tensor | None = None
    if any(row.types is not None for row in rows):
        types = [row.types or (0,) * len(row.ids) for row in rows]
        type_ids = torch.tensor(list(chain.from_iterable(types)))[None].to(device)
    return Packed(input_ids[None].to(device), positions[None].to(device), type_ids, cu_seqlens)
