"""Sequences of different lengths in one `[1, T]` row: no padding, nobody sees a neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """input_ids, position_ids and segment_ids: [1, T] int64; cu_seqlens: S + 1 offsets into T."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    cu_seqlens: tuple[int, ...]


def pack(sequences: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """S token-id sequences -> one row of T = sum of their lengths. No sequence may be empty."""
    lengths = [len(sequence) for sequence in sequences]
    assert all(lengths), "bug: an empty sequence cannot be packed"
    cu_seqlens = (0, *accumulate(lengths))
    lengths_tensor = torch.tensor(lengths)
    segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths_tensor)
    position_ids = torch.arange(cu_seqlens[-1]) - torch.tensor(cu_seqlens[:-1])[segment_ids]
    input_ids = torch.tensor(list(chain.from_iterable(sequences)))
    return Packed(
        input_ids=input_ids[None].to(device),
        position_ids=position_ids[None].to(device),
        segment_ids=segment_ids[None].to(device),
        cu_seqlens=cu_seqlens,
    )


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
