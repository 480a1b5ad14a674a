"""Which key blocks a block of rows can see, whole or in part: ranges of blocks, the same for every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from service.attention.masks import MaskSpec, bounds_at


@dataclass(frozen=True, slots=True)
class Layout:
    """Of nQ blocks of rows. Bounds grow with the row, so the blocks seen by any or by all rows are ranges."""

    block_size: int
    rows: torch.Tensor  # [nQ, R] int64; the last row repeated where the last block is ragged
    lo: torch.Tensor  # [nQ, R] int64: first key that the row sees
    hi: torch.Tensor  # [nQ, R] int64: one past the last
    seen: torch.Tensor  # [nQ, 2] int64: blocks seen by any row, [start, stop)
    full: torch.Tensor  # [nQ, 2] int64: blocks of which every row sees every key, within `seen`
    key_length: int
    query_length: int

    @property
    def q_blocks(self) -> int:
        return self.rows.shape[0]

    @property
    def k_blocks(self) -> int:
        return -(-self.key_length // self.block_size)

    def columns(self, blocks: slice, of: torch.Tensor) -> slice:
        """The range that holds the ranges (`seen` or `full`) of a few blocks of rows."""
        some = of[blocks][of[blocks, 0] < of[blocks, 1]]
        return slice(int(some[:, 0].min()), int(some[:, 1].max())) if len(some) else slice(0, 0)

    def within(self, blocks: slice | torch.Tensor, columns: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """columns [c] -> [blocks, c] bool: in the range (`seen` or `full`) of each block of rows."""
        return (columns >= of[blocks, :1]) & (columns < of[blocks, 1:])

    def table(self, of: torch.Tensor) -> torch.Tensor:
        """[nQ, nK] bool: in the range (`seen` or `full`) of each block of rows."""
        return self.within(slice(0, self.q_blocks), torch.arange(self.k_blocks, device=of.device), of)

    def whole(self) -> torch.Tensor:
        """[nQ, nK] bool: blocks of which every row sees every key."""
        return self.table(self.full)

    def row_counts(self) -> torch.Tensor:
        """[nQ] int64: real rows of each block."""
        size = self.rows.shape[1]
        counts = torch.full((self.q_blocks,), size, device=self.rows.device)
        counts[-1] = self.query_length - (self.q_blocks - 1) * size
        return counts


def layout_of(mask: MaskSpec, query_length: int, key_length: int, block_size: int, device: torch.device) -> Layout:
    """`mask` without kv_lengths and packing (`segments.split` takes both away)."""
    size = min(block_size, query_length)
    q_blocks = -(-query_length // size)
    rows = torch.arange(q_blocks * size, device=device).clamp(max=query_length - 1)
    lo, hi = (bound[0].view(q_blocks, size) for bound in bounds_at(mask, rows[None], query_length, key_length))
    first, last = lo[:, 0], hi[:, -1]
    seen = torch.stack((first // block_size, -(-last // block_size)), 1)
    seen[first >= last] = 0
    full = torch.stack((-(-lo[:, -1] // block_size), hi[:, 0] // block_size), 1)
    full[full[:, 0] >= full[:, 1]] = 0
    return Layout(block_size, rows.view(q_blocks, size), lo, hi, seen, full, key_length, query_length)
