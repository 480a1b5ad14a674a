"""Where attention reads: for each tile of queries and keys, the share of its visible pairs that was scored.

One byte a tile: 0 where no row sees a key; else 1 + 254 * share, so 255 where all was computed exactly, and 1 where
all keys are answered for by estimates. Outliers and single rows that sparse attention computes exactly are not shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from service.attention.masks import MaskSpec, row_bounds
from service.attention.pairs import MOST_TILES, tile_length


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Pairs by tile: r tiles of rows, c of keys."""

    rows: torch.Tensor  # [r + 1] int64: the edges of the tiles
    keys: torch.Tensor  # [c + 1]
    visible: torch.Tensor  # [B, r, c] float32, of each head
    read: torch.Tensor  # [B, Hq, r, c]

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, mask: MaskSpec, most: int = MOST_TILES) -> Self:
        """query [B, Hq, Lq, D], key [B, Hkv, Lk, D]: nothing is read yet. An attn_mask hides nothing here.

        At most `most` tiles a side.
        """
        batch, heads, length, _ = query.shape
        rows, keys = (edges(size, most, query.device) for size in (length, key.shape[2]))
        visible = torch.zeros(batch, len(rows) - 1, len(keys) - 1, device=query.device)
        for tile, (start, stop) in enumerate(zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True)):
            bounds = row_bounds(mask, batch, length, key.shape[2], start, stop, query.device)
            visible[:, tile] = seen(*bounds, keys).sum(1)
        return cls(rows, keys, visible, torch.zeros(batch, heads, *visible.shape[1:], device=query.device))

    def of_batch(self, batch: slice) -> BlockMap:
        """A view of some sequences."""
        return BlockMap(self.rows, self.keys, self.visible[batch], self.read[batch])

    def clear(self) -> None:
        self.read.zero_()

    def fill(self, heads: Iterable[int]) -> None:
        """These heads read all that they see."""
        for head in heads:
            self.read[:, head] = self.visible

    def add(self, pairs: torch.Tensor, rows: torch.Tensor, heads: slice | torch.Tensor = slice(None)) -> None:
        """pairs [B, g or 1, n, c] read by n stretches of rows with n + 1 edges; each spreads over its rows evenly."""
        length = rows.diff().clamp(min=1)
        first, last = torch.maximum(self.rows[:-1, None], rows[:-1]), torch.minimum(self.rows[1:, None], rows[1:])
        self.read[:, heads] += ((last - first).clamp(min=0) / length) @ pairs.float()

    def octets(self) -> torch.Tensor:
        """[B, Hq, r, c] uint8."""
        share = (self.read / self.visible.clamp(min=1)[:, None]).clamp_(0.0, 1.0)
        return (1 + 254 * share).round_().masked_fill_(self.visible[:, None] == 0, 0.0).to(torch.uint8)


def exact_map(query: torch.Tensor, key: torch.Tensor, mask: MaskSpec, most: int = MOST_TILES) -> BlockMap:
    """Of attention that reads all that is visible."""
    found = BlockMap.of(query, key, mask, most)
    found.fill(range(query.shape[1]))
    return found


def edges(length: int, most: int, device: torch.device) -> torch.Tensor:
    """[n + 1] int64: of the tiles of an axis."""
    size = tile_length(length, most)
    return torch.arange(0, length + size, size, device=device).clamp(max=length)


def seen(lo: torch.Tensor, hi: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """lo and hi [B, R] of rows, keys [c + 1] edges -> [B, R, c]: visible keys between the edges."""
    return (torch.minimum(hi[..., None], keys[1:]) - torch.maximum(lo[..., None], keys[:-1])).clamp(min=0)
