"""Rows that are computed together, and the keys that all of them see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from service.attention.geometry import LeafShape
from service.attention.masks import Bounds, MaskSpec, row_bounds


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Some rows. They see the keys of `segments` in full, and some see some of those in `near`."""

    rows: slice
    segments: range  # empty: all keys that the rows see are near
    near: tuple[slice, ...]  # keys
    bounds: Bounds  # (lo, hi) [1, rows]: the keys that each row sees


def tiles(mask: MaskSpec, query_length: int, key_length: int, shape: LeafShape, device: torch.device) -> Iterator[Tile]:
    """All rows in order; `mask` has no kv_lengths, no packing and no attn_mask."""
    for start in range(0, query_length, shape.segment):
        rows = slice(start, min(start + shape.segment, query_length))
        lo, hi = row_bounds(mask, 1, query_length, key_length, rows.start, rows.stop, device)
        first, last = int(lo.min()), int(hi.max())
        whole = range(-(-int(lo.max()) // shape.segment), int(hi.min()) // shape.segment)
        edges: tuple[slice, ...] = (slice(first, last),)
        if whole:
            edges = slice(first, whole.start * shape.segment), slice(whole.stop * shape.segment, last)
        yield Tile(rows, whole, tuple(edge for edge in edges if edge.stop > edge.start), (lo, hi))
