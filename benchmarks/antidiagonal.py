"""XAttention's choice of key blocks, the yardstick for ours (`selection.py`): antidiagonals of strided tiles.

Of every tile of S x S scores one antidiagonal is summed, by a product of queries and keys reshaped [L, D] ->
[L/S, S D] with the queries of a stride in reverse. The means become weights of whole strides, weights are added per
block, and a block of rows reads the heaviest blocks until they hold `threshold` of its weight. What is not read is
dropped. Ref: XAttention, arXiv 2503.16428, and its released code, which lets a causal row always read the first block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, Scoring
from service.attention.scores import LOG2_E, cap, exponentiate, fitting, normalise
from service.attention.sparse.layout import Layout, layout_of
from service.attention.sparse.selection import Selection, read_pairs

STRIDE = 16
TILE_BYTES = 16 * 2**20  # of one tile of weights


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    block_size: int,
    threshold: float,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    stride: int = STRIDE,
) -> Selection:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> the blocks to read; a threshold of 1 keeps all that is visible.

    `mask` as it is in a segment of `segments.split`. ValueError: an attn_mask, or blocks that strides do not divide.
    """
    if mask.attn_mask is not None:
        raise ValueError("attn_mask: antidiagonals skip most scores and cannot hold a mask of single ones")
    if stride < 1 or block_size % stride:
        raise ValueError(f"stride: expected a divisor of block_size {block_size}, got {stride}")
    batch, heads, query_length, head_dim = query.shape
    group, key_length = heads // key.shape[1], key.shape[2]
    layout = layout_of(mask, query_length, key_length, block_size, query.device)
    strides = _Strides(layout, stride, scoring.softcap)
    bits = scoring.scale_for(head_dim) * LOG2_E
    always = _always(layout, mask.is_causal)
    keep = torch.zeros(batch, heads, *always.shape, dtype=torch.bool, device=query.device)
    for b in range(batch):
        for h in range(heads):
            if h % group == 0:
                keys = strides.of_keys(key[b, h // group].float())
            weights = strides.block_weights(query[b, h].float() * bits, keys)
            keep[b, h] = heaviest(weights, always, layout.table(layout.seen), threshold)
    pairs = sum(read_pairs(layout, keep[b, h]) for b in range(batch) for h in range(heads))
    visible = batch * heads * mask.visible_pairs(query_length, key_length)
    return Selection(layout, keep, moments=(), summarized=(), by_row=False, pairs=pairs, visible=visible)


def heaviest(weights: torch.Tensor, always: torch.Tensor, seen: torch.Tensor, threshold: float) -> torch.Tensor:
    """weights [nQ, nK] -> [nQ, nK] bool: `always` first, then the heaviest until they hold `threshold` of a row."""
    if threshold >= 1:  # rounding and underflow would leave blocks out
        return seen
    order = torch.where(always, torch.inf, weights).sort(1, descending=True).indices
    ordered = weights.gather(1, order)
    before = ordered.cumsum(1) - ordered
    enough = before >= threshold * weights.sum(1, keepdim=True)
    return (always | torch.zeros_like(seen).scatter(1, order, ~enough)) & seen


@dataclass(frozen=True, slots=True)
class _Strides:
    """Rows and keys of one head, `stride` at a time."""

    layout: Layout
    stride: int
    softcap: float | None

    @property
    def _per_block(self) -> int:
        """Strides of a block of rows; a lone short block may end within one."""
        return -(-self.layout.rows.shape[1] // self.stride)

    def of_keys(self, key: torch.Tensor) -> torch.Tensor:
        """[Lk, D] -> [nS, S * D]; the last key fills up a ragged stride."""
        count = -(-len(key) // self.stride) * self.stride
        return key[torch.arange(count, device=key.device).clamp(max=len(key) - 1)].view(count // self.stride, -1)

    def block_weights(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """q [Lq, D] in bits, keys [nS, S * D] -> [nQ, nK]: the softmax weight of each block's keys, rows added."""
        layout, count = self.layout, self._per_block
        parts = []
        step = fitting(TILE_BYTES, count * len(keys), q.device)
        for start in range(0, layout.q_blocks, step):
            stop = min(start + step, layout.q_blocks)
            at = torch.arange(start * count * self.stride, stop * count * self.stride, device=q.device)
            weights = self._weights(q, keys, at.view(-1, self.stride))
            missing = layout.k_blocks * layout.block_size // self.stride - len(keys)
            parts.append(pad(weights, (0, missing)).view(stop - start, count, layout.k_blocks, -1).sum((1, 3)))
        return torch.cat(parts)

    def _weights(self, q: torch.Tensor, keys: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Strides of rows at [n, S] -> [n, nS]; those past the last row weigh nothing."""
        rows = at.clamp(max=self.layout.query_length - 1)
        reverse = q[rows.flip(1)].flatten(1)  # so that the product runs along antidiagonals
        scores = cap((reverse @ keys.T).div_(self.stride), self.softcap)
        lo, hi = (bound.flatten()[rows] for bound in (self.layout.lo, self.layout.hi))
        first, last = lo[:, :1] // self.stride, -(-hi[:, -1:] // self.stride)
        place = torch.arange(len(keys), device=q.device)
        real = at[:, :1] < self.layout.query_length
        scores.masked_fill_((place < first) | (place >= last) | ~real, -torch.inf)
        weights, total, _ = exponentiate(scores)
        return normalise(weights, total)


def _always(layout: Layout, is_causal: bool) -> torch.Tensor:
    """[nQ, nK] bool: blocks seen in part, and of causal attention the first."""
    always = ~layout.whole()
    always[:, 0] |= is_causal
    return always & layout.table(layout.seen)
