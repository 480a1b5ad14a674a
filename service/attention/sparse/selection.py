"""Which key blocks a block of queries reads: moments, outliers and the risk of not reading. For any q, k, v.

A key block that is not read is still answered for, by its moments (`moments.py`): its mass is estimated, and its mean
value stands for its values. What that costs a row is its share of the row's mass times how unevenly the row weighs
the block's keys, the coefficient of variation sqrt(E[w^2] / E[w]^2 - 1) of their weights; and it weighs the more, the
more the row's values cancel (rows of diffuse attention are averages close to zero). A block is read where this risk is
over epsilon for any of the sampled rows, or where rows see only a part of it.

The lightest blocks of all, a NEGLIGIBLE part of any sampled row together, are left out altogether. Every
SAMPLE_STRIDE-th row is looked at; outliers are attended exactly by all rows, looked at or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log2

import torch

from service.attention import DEFAULT_BLOCK_SIZE, DEFAULT_EPSILON
from service.attention.geometry import ESTIMATE_TILE_BYTES, SAMPLE_STRIDE
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec, as_bias, bias_at, cut, four
from service.attention.output import DEFAULT_SCORING, Checkpoint, Scoring, no_checkpoint
from service.attention.scores import LOG2_E, Scratch, cap, fitting
from service.attention.sparse.layout import Layout, layout_of
from service.attention.sparse.moments import Moments, moments_of

PILOT_BLOCKS = 6  # blocks of rows of each head that show how much the head would read
NEGLIGIBLE = 0.3  # of epsilon: the share of a row that blocks left out altogether may have
Pair = tuple[torch.Tensor, torch.Tensor]  # keys [nO, D] and values [nO, Dv]


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """What decides how much is read."""

    block_size: int = DEFAULT_BLOCK_SIZE
    epsilon: float = DEFAULT_EPSILON
    max_density: float | None = None  # heads that would read more are left to exact attention; None: none are


@dataclass(frozen=True, slots=True)
class SummarizedBlocks:
    """Key blocks whose moments stand beside what a few blocks of rows read."""

    blocks: slice
    columns: torch.Tensor  # [c] int64; for each block of rows those that it sees in full and does not read


@dataclass(frozen=True, slots=True)
class Selection:
    """Blocks to read. Those seen in part are always kept, invisible ones never."""

    layout: Layout
    keep: torch.Tensor  # [B, Hq, nQ, nK] bool
    moments: Sequence[Sequence[Moments]]  # [B][Hq]; empty: blocks that are not kept are dropped
    summarized: Sequence[Sequence[Sequence[SummarizedBlocks]]]  # [B][Hq]; all rows in order
    by_row: bool  # an attn_mask differs from row to row: moments cannot hold it, and none stand beside
    pairs: int  # visible pairs of the kept blocks, of outliers and of centroids, over all heads
    visible: int  # visible pairs, over all heads
    exact: frozenset[tuple[int, int]] = frozenset()  # (sequence, head): would read too much; `keep` has all they see

    @property
    def density(self) -> float:
        return self.pairs / max(self.visible, 1)


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    settings: SelectionSettings,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> Selection:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> the blocks to read, and their moments.

    `mask` has no kv_lengths and no packing (`segments.split`).
    """
    pause = checkpoint or no_checkpoint
    batch, heads, query_length, head_dim = query.shape
    group, key_length = heads // key.shape[1], key.shape[2]
    layout = layout_of(mask, query_length, key_length, settings.block_size, query.device)
    keep = torch.zeros(batch, heads, layout.q_blocks, layout.k_blocks, dtype=torch.bool, device=query.device)
    by_row = mask.attn_mask is not None and four(mask.attn_mask).shape[2] > 1
    by_head = mask.attn_mask is not None and four(mask.attn_mask).shape[1] > 1
    moments: list[list[Moments]] = [[] for _ in range(batch)]
    summarized: list[list[list[SummarizedBlocks]]] = [[] for _ in range(batch)]
    scratch = Scratch(query.device)
    bits = scoring.scale_for(head_dim) * LOG2_E
    pairs, exact, of_head = 0, set(), mask.visible_pairs(query_length, key_length)
    for b, h in product(range(batch), range(heads)):
        if h % group == 0 or by_head:
            keys = scratch.float32("keys", key[b, h // group])
            values = scratch.float32("values", value[b, h // group])
            own = moments_of(keys, values, _key_bias(mask, b, h, key_length), settings.block_size, pause)
        selector = BlockSelector(
            layout, own, mask if by_row else None, (b, h), settings.epsilon, scoring.softcap, scratch
        )
        q = scratch.float32("query", query[b, h]).mul_(bits)
        moments[b].append(own)
        if settings.max_density is not None and selector.predicted_density(q, keys, values) > settings.max_density:
            exact.add((b, h))
            keep[b, h] = layout.table(layout.seen)
            summarized[b].append([])
            pairs += of_head
            continue
        keep[b, h], parts = selector.choose(q, keys, values, pause)
        summarized[b].append(parts)
        pairs += read_pairs(layout, keep[b, h]) + summarized_pairs(layout, keep[b, h], own, parts)
    visible = batch * heads * of_head
    return Selection(layout, keep, moments, summarized, by_row, pairs, visible, frozenset(exact))


def predicted_density(inputs: AttentionInputs, settings: SelectionSettings, pause: Checkpoint) -> float:
    """Share of the visible blocks that one head would read; of the first sequence, without an attn_mask."""
    query, key, value = inputs.tensors
    layout = layout_of(inputs.mask, query.shape[2], key.shape[2], settings.block_size, query.device)
    scratch, h = Scratch(query.device), key.shape[1] // 2
    keys, values = scratch.float32("keys", key[0, h]), scratch.float32("values", value[0, h])
    own = moments_of(keys, values, None, settings.block_size, pause)
    selector = BlockSelector(layout, own, None, (0, h), settings.epsilon, inputs.scoring.softcap, scratch)
    bits = inputs.scoring.scale_for(query.shape[3]) * LOG2_E
    q = scratch.float32("query", query[0, h * query.shape[1] // key.shape[1]]).mul_(bits)
    return selector.predicted_density(q, keys, values)


def read_pairs(layout: Layout, keep: torch.Tensor) -> int:
    """Of one head: visible pairs of the blocks keep [nQ, nK]."""
    rows, whole = layout.row_counts(), layout.whole()
    count = (keep & whole).sum(1) * layout.block_size
    at, block = (keep & ~whole).nonzero().unbind(1)  # seen in part: row by row
    begin = block[:, None] * layout.block_size
    end = (begin + layout.block_size).clamp(max=layout.key_length)
    inside = (torch.minimum(layout.hi[at], end) - torch.maximum(layout.lo[at], begin)).clamp(min=0)
    real = torch.arange(layout.rows.shape[1], device=keep.device) < rows[at, None]
    return int((count * rows).sum() + (inside * real).sum())


def summarized_pairs(
    layout: Layout, keep: torch.Tensor, moments: Moments, summarized: Sequence[SummarizedBlocks]
) -> int:
    """Of one head: a pair for each row and outlier, and for each row and centroid that stands for keys."""
    rows, others = layout.row_counts(), layout.whole() & ~keep
    of_block = torch.bincount(moments.outliers // layout.block_size, minlength=layout.k_blocks)
    count = (others * of_block).sum(1)
    for part in summarized:
        count[part.blocks] += others[part.blocks, part.columns].sum(1)
    return int((count * rows).sum())


@dataclass(frozen=True, slots=True)
class BlockSelector:
    """What decides for one head."""

    layout: Layout
    moments: Moments
    row_mask: MaskSpec | None  # with an attn_mask of its own for every row: moments cannot hold it
    index: tuple[int, int]  # sequence, head
    epsilon: float
    softcap: float | None
    scratch: Scratch

    @property
    def looked_at(self) -> torch.Tensor:
        """[samples] places within a block of rows: its ends, where topics change unseen, and evenly between them."""
        size = self.layout.rows.shape[1]
        return torch.linspace(0, size - 1, -(-size // SAMPLE_STRIDE), device=self.layout.rows.device).round().long()

    def choose(
        self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pause: Checkpoint
    ) -> tuple[torch.Tensor, list[SummarizedBlocks]]:
        """q [Lq, D] in bits, key [Lk, D], value [Lk, Dv] -> keep [nQ, nK] and what stands beside it."""
        layout = self.layout
        keep = torch.zeros(layout.q_blocks, layout.k_blocks, dtype=torch.bool, device=q.device)
        summarized: list[SummarizedBlocks] = []
        outliers = key[self.moments.outliers], value[self.moments.outliers]
        columns = layout.key_length if self.row_mask is not None else layout.k_blocks + len(outliers[0])
        sampled = layout.rows[:, self.looked_at]
        step = fitting(ESTIMATE_TILE_BYTES, sampled.shape[1] * columns, q.device)
        for start in range(0, layout.q_blocks, step):
            pause()
            blocks = slice(start, min(start + step, layout.q_blocks))
            seen = layout.columns(blocks, layout.seen)
            if seen.stop == seen.start:
                continue
            keep[blocks, seen], stand = self._blocks(q[sampled[blocks].flatten()], outliers, blocks, seen)
            summarized.append(SummarizedBlocks(blocks, stand))
        return keep, summarized

    def predicted_density(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
        """Share of the visible blocks that some blocks of rows, evenly spread, would read; as `choose`."""
        layout = self.layout
        outliers = key[self.moments.outliers], value[self.moments.outliers]
        sampled = layout.rows[:, self.looked_at]
        read = seen_blocks = 0
        for block in torch.linspace(0, layout.q_blocks - 1, min(PILOT_BLOCKS, layout.q_blocks)).round().int().tolist():
            blocks = slice(block, block + 1)
            seen = layout.columns(blocks, layout.seen)
            if seen.stop > seen.start:
                read += int(self._blocks(q[sampled[blocks].flatten()], outliers, blocks, seen)[0].sum())
                seen_blocks += seen.stop - seen.start
        return read / max(1, seen_blocks)

    def _blocks(self, q: torch.Tensor, outliers: Pair, blocks: slice, seen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """q [n, D], of the sampled rows of a few blocks -> kept [blocks, seen] and the columns that stand beside."""
        columns = torch.arange(seen.start, seen.stop, device=q.device)
        any_row, every_row = (self.layout.within(blocks, columns, of) for of in (self.layout.seen, self.layout.full))
        least, first, second = self.moments.masses(q, seen, self.softcap, self.scratch)
        self._weigh(least.view(len(any_row), -1, len(columns)), any_row & ~every_row, every_row, blocks, seen)
        powers = self.scratch.take("powers", *least.shape)
        exact = self._outlier_scores(q, outliers[0], blocks)
        log_total = _log_total(least, exact, powers)
        least -= log_total
        share = first.add_(least).exp2_()
        heaviest = share.amax(0)
        if self.row_mask is None:
            risk = second.add_(least).exp2_().square_().addcmul_(share, share, value=-1)
        else:  # a mask of every row's own makes the moments a guess: all of the share is at risk
            risk = share.square()
        mean = torch.addmm(exact.sub_(log_total).exp2_() @ outliers[1], share, self.moments.value[seen])
        square = mean.square_().sum(1, keepdim=True).clamp_(max=self.moments.value_square)
        risk *= self.moments.value_square / square.clamp_(min=torch.finfo(square.dtype).tiny)
        by_block = risk.view(len(any_row), -1, len(columns))
        kept = any_row & ~(every_row & (by_block.amax(1) <= self.epsilon**2))  # written so that NaN is kept
        if self.row_mask is not None:
            return kept, columns[:0]
        heaviest, column = heaviest.masked_fill_(~(every_row & ~kept).any(0), 0.0).sort()
        matter = ~(heaviest.cumsum(0) <= self.epsilon * NEGLIGIBLE)
        return kept, columns[column[matter].sort().values]

    def _weigh(
        self, score: torch.Tensor, partial: torch.Tensor, full: torch.Tensor, blocks: slice, seen: slice
    ) -> None:
        """score [blocks, samples, seen], in place: from that of the centroid to log2 of the least mass (Jensen)."""
        layout, weight = self.layout, self.moments.log_weight[seen]
        if self.row_mask is not None:
            score += self._row_bias(blocks, seen).view(score.shape)
        row, column = partial.nonzero().unbind(1)
        lo, hi = (of[blocks, self.looked_at][row] for of in (layout.lo, layout.hi))
        begin = ((seen.start + column) * layout.block_size)[:, None]
        share = (torch.minimum(hi, begin + layout.block_size) - torch.maximum(lo, begin)).clamp(min=0)
        part = score[row, :, column] + (share / layout.block_size).log2() + weight[column, None]
        score += torch.where(full, weight, -torch.inf)[:, None]
        score[row, :, column] = part

    def _outlier_scores(self, q: torch.Tensor, outliers: torch.Tensor, blocks: slice) -> torch.Tensor:
        layout, positions = self.layout, self.moments.outliers
        exact = cap(q @ outliers.T, self.softcap)
        if self.row_mask is not None:
            exact += self._bias(layout.rows[blocks, self.looked_at].reshape(-1, 1), positions)
        lo, hi = (of[blocks, self.looked_at].reshape(-1, 1) for of in (layout.lo, layout.hi))
        return exact.masked_fill_((positions < lo) | (positions >= hi), -torch.inf)

    def _bias(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        assert self.row_mask is not None, "bug: no mask of every row's own"
        assert self.row_mask.attn_mask is not None, "bug: a mask without a mask"
        return bias_at(self.row_mask.attn_mask, *self.index, rows, keys) * LOG2_E

    def _row_bias(self, blocks: slice, seen: slice) -> torch.Tensor:
        """[n, seen]: log2 of the mean of exp(bias) over each block, for masks that differ from row to row."""
        rows = self.layout.rows[blocks, self.looked_at].reshape(-1, 1)
        size, last = self.layout.block_size, self.layout.key_length
        keys = torch.arange(seen.start * size, seen.stop * size, device=rows.device)
        bias = self._bias(rows, keys.clamp(max=last - 1)).masked_fill(keys >= last, -torch.inf)
        return (bias.expand(len(rows), -1).view(len(rows), -1, size) / LOG2_E).logsumexp(2) * LOG2_E - log2(size)


def _log_total(score: torch.Tensor, exact: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """score [n, c], exact [n, nO] -> [n, 1]: log2 of the sum of 2^x over both; 0 where there is nothing."""
    top = torch.cat((score.amax(1, keepdim=True), exact), 1).amax(1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.sub(score, top, out=powers).exp2_().sum(1, keepdim=True)
    total += (exact - top).exp2_().sum(1, keepdim=True)
    return total.log2_().add_(top).nan_to_num_(neginf=0.0)


def _key_bias(mask: MaskSpec, b: int, h: int, key_length: int) -> torch.Tensor | None:
    """[Lk] float32 where an attn_mask says the same to every row of a head."""
    if mask.attn_mask is None or four(mask.attn_mask).shape[2] > 1:
        return None
    part = cut(mask.attn_mask, slice(b, b + 1), slice(h, h + 1), slice(0, 1), slice(0, key_length))
    return as_bias(part)[0, 0, 0].expand(key_length)
