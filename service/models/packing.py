"""Sequences of different lengths in one `[1, T]` row, without padding; tokens attend within their own sequence only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch

from service.models.inputs.rows import EncodedInput


@dataclass(frozen=True, slots=True)
class Packed:
    """Arguments of one packed pass over S sequences of T tokens together."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    type_ids: torch.Tensor | None  # [1, T] int64; None if no sequence is a pair
    cu_seqlens: tuple[int, ...]  # S + 1 offsets into T


def pack(
    rows: Sequence[EncodedInput], device: torch.device, first_position: int = 0, padding_id: int | None = None
) -> Packed:
    """S rows, none of them empty -> one row of T tokens. Positions start at `first_position` in each sequence; tokens
    `padding_id` stand at that number and are not counted, as RoBERTa numbers its tokens."""
    lengths = [len(row.ids) for row in rows]
    assert all(lengths), "bug: an empty sequence cannot be packed"
    cu_seqlens = (0, *accumulate(lengths))
    positions = torch.cat([_positions(row.ids, first_position, padding_id) for row in rows])
    input_ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)))
    type_ids: torch.Tensor | None = None
    if any(row.types is not None for row in rows):
        types = [row.types or (0,) * len(row.ids) for row in rows]
        type_ids = torch.tensor(list(chain.from_iterable(types)))[None].to(device)
    return Packed(input_ids[None].to(device), positions[None].to(device), type_ids, cu_seqlens)


def stack(
    rows: Sequence[EncodedInput], device: torch.device, dtype: torch.dtype, decoder_start: int | None
) -> dict[str, Any]:
    """S rows of equal shape -> arguments of one pass without packing.

    [S, L] ids, [S, C, H, W] pixels or [S, mel bands, frames] spectrograms of `dtype`. `decoder_start`: the id that
    targets are shifted behind.
    """
    if rows[0].features is not None:
        features = torch.stack([row.features for row in rows if row.features is not None])
        return {"pixel_values" if features.ndim == 4 else "input_features": features.to(device, dtype)}
    arguments = {"input_ids": torch.tensor([row.ids for row in rows], device=device)}
    if any(row.types for row in rows):
        types = [row.types or (0,) * len(row.ids) for row in rows]
        arguments["token_type_ids"] = torch.tensor(types, device=device)
    if rows[0].target is not None:
        shifted = [(decoder_start, *(row.target or ())[:-1]) for row in rows]
        arguments["decoder_input_ids"] = torch.tensor(shifted, device=device)
    return arguments


def computed_positions(arguments: Mapping[str, Any], states: int) -> int:
    """Positions that a pass with these arguments computes, padding included. `states`: of one image or window."""
    for name in ("pixel_values", "input_features"):
        if name in arguments:
            return len(arguments[name]) * states
    return sum(arguments[name].numel() for name in ("input_ids", "decoder_input_ids") if name in arguments)


def _positions(ids: Sequence[int], first: int, padding_id: int | None) -> torch.Tensor:
    if padding_id is None or padding_id not in ids:
        return torch.arange(first, first + len(ids))
    counted = torch.tensor(ids) != padding_id
    return torch.where(counted, counted.cumsum(0) + first - 1, padding_id)
