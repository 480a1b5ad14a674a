"""Sequences of different lengths in one `[1, T]` row: no padding, nobody sees a neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from service.models.inputs.rows import EncodedInput


@dataclass(frozen=True, slots=True)
class Packed:
    """input_ids, position_ids and (where a row is a pair) type_ids: [1, T] int64; cu_seqlens: S + 1 offsets into T."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    type_ids: torch.Tensor | None
    cu_seqlens: tuple[int, ...]


def pack(rows: Sequence[EncodedInput], device: torch.device, first_position: int = 0) -> Packed:
    """S rows -> one of T tokens, the sum of their lengths; positions start anew in each. No row may be empty."""
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


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Consecutive runs of sequences of at most `max_tokens` together; one longer sequence runs alone."""
    runs: list[range] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > max_tokens:
            runs.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    if start < len(lengths):
        runs.append(range(start, len(lengths)))
    return runs


def split_by_shape(shapes: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Indices of rows of equal shape, at most `max_tokens` together: batches that need no padding."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(index)
    found = []
    for shape, indices in alike.items():
        step = max(1, max_tokens // max(1, sum(shape)))
        found += [indices[start : start + step] for start in range(0, len(indices), step)]
    return found
