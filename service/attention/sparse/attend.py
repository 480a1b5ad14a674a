"""Runs a selection: kept blocks are gathered and read exactly; outliers and the moments of the rest stand beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from service.attention.geometry import RISKY_ROWS, SPARSE_TILE_BYTES
from service.attention.masks import MaskSpec, bias_at
from service.attention.merge import Partial, merge, shares
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring, no_checkpoint
from service.attention.scores import LOG2_E, Scratch, cap, exponentiate, fitting, lse_of, normalise
from service.attention.sparse.layout import Layout
from service.attention.sparse.moments import Moments
from service.attention.sparse.selection import Selection, SummarizedBlocks


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    selection: Selection,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq].

    Heads that the selection leaves to exact attention are zeros, for the caller to fill.
    """
    batch, heads, query_length, head_dim = query.shape
    out = query.new_empty(batch, heads, query_length, value.shape[3])
    lse = torch.zeros(out.shape[:3], device=query.device)
    lse_read = torch.zeros_like(lse)
    layout, group = selection.layout, heads // key.shape[1]
    pause, scratch = checkpoint or no_checkpoint, Scratch(query.device)
    bits = scoring.scale_for(head_dim) * LOG2_E
    filled = (-1, -1)  # sequence and head of `keys` and `values`
    for b, h in product(range(batch), range(heads)):
        pause()
        if (b, h) in selection.exact:
            out[b, h] = 0
            continue
        if filled != (b, h // group):
            filled = b, h // group
            keys, values = (
                _in_blocks(x[b, h // group], layout.block_size, scratch, name)
                for name, x in (("key", key), ("value", value))
            )
        q = _in_blocks(query[b, h], layout.rows.shape[1], scratch, "query")
        q *= bits
        head = QueryHead(layout, selection.keep[b, h], mask, (b, h), scoring.softcap, scratch)
        head_out, whole = head.read(q, keys, values, pause)
        read = whole
        if selection.moments:
            parts = selection.summarized[b][h]
            rest, rest_lse, outlier_lse = head.summarized(q, keys, values, selection.moments[b][h], parts, pause)
            read_share, rest_share, both = shares(whole, rest_lse)
            head_out.mul_(read_share[..., None]).addcmul_(rest, rest_share[..., None])
            whole, read = both, shares(whole, outlier_lse)[2]
        out[b, h] = head_out.flatten(0, 1)[:query_length]
        lse[b, h], lse_read[b, h] = (x.flatten()[:query_length] for x in (whole, read))
    return AttentionOutput(out, lse, selection.density, selection.pairs, risky_rows(lse, lse_read), lse_read)


def risky_rows(lse: torch.Tensor, lse_read: torch.Tensor) -> torch.Tensor:
    """[n, 3] int64 (batch, head, row): those of each head that read the least of their mass, looked at or not."""
    read = (lse_read - lse).nan_to_num(0.0)  # rows without keys: -inf - -inf
    rows = read.topk(min(RISKY_ROWS, lse.shape[2]), dim=2, largest=False).indices
    batch, heads = (torch.arange(size, device=lse.device) for size in lse.shape[:2])
    where = batch[:, None, None].expand_as(rows), heads[:, None].expand_as(rows), rows
    return torch.stack(where, -1).view(-1, 3)


def _in_blocks(rows: torch.Tensor, size: int, scratch: Scratch, name: str) -> torch.Tensor:
    """[L, x] -> [n, size, x] float32 of its own, the last block filled with zeros."""
    blocks = -(-len(rows) // size)
    out = scratch.take(name, blocks * size, rows.shape[1])
    out[: len(rows)] = rows
    out[len(rows) :] = 0
    return out.view(blocks, size, -1)


@dataclass(frozen=True, slots=True)
class QueryHead:
    """One query head of one sequence."""

    layout: Layout
    keep: torch.Tensor  # [nQ, nK] bool
    mask: MaskSpec
    index: tuple[int, int]  # sequence, head
    softcap: float | None
    scratch: Scratch

    def read(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pause: Checkpoint) -> Partial:
        """q [nQ, R, D] in bits, keys and values [nK, B, x] -> out [nQ, R, Dv], lse [nQ, R] over the kept blocks."""
        out = self.scratch.take("read", *q.shape[:2], values.shape[2]).zero_()
        lse = q.new_full(q.shape[:2], -torch.inf)
        for tasks, columns, partial in self._groups():
            result: Partial | None = None
            step = fitting(SPARSE_TILE_BYTES, q.shape[1] * self.layout.block_size * len(tasks), q.device)
            for start in range(0, columns.shape[1], step):
                pause()
                part = columns[:, start : start + step]
                edge = min(max(partial - start, 0), part.shape[1])
                tile = self._tile(q[tasks], keys, values, tasks, part, edge)
                result = tile if result is None else merge(*result, *tile)
            assert result is not None, "bug: a task without blocks"
            out[tasks], lse[tasks] = result
        return out, lse

    def _groups(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """(blocks of rows [g], their key blocks [g, w], how many of these are seen in part): no padding, one width."""
        layout = self.layout
        full = self.keep & layout.whole()
        edges = self.keep & ~full
        counts = torch.stack((edges.sum(1), full.sum(1)))
        order = torch.argsort(counts[0] * (layout.k_blocks + 1) + counts[1], descending=True)
        parts = [(which.nonzero()[:, 1], which.sum(1).cumsum(0) - which.sum(1)) for which in (edges, full)]
        shapes, runs = torch.unique_consecutive(counts[:, order], dim=1, return_counts=True)
        first = 0
        for (partial, whole), run in zip(shapes.T.tolist(), runs.tolist(), strict=True):
            width = partial + whole
            if width:
                step = fitting(SPARSE_TILE_BYTES, layout.rows.shape[1] * layout.block_size * width, self.keep.device)
                for start in range(first, first + run, step):
                    tasks = order[start : min(start + step, first + run)]
                    columns = [
                        blocks[offset[tasks, None] + torch.arange(count, device=tasks.device)]
                        for (blocks, offset), count in zip(parts, (partial, whole), strict=True)
                    ]
                    yield tasks, torch.cat(columns, 1), partial
            first += run

    def _tile(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tasks: torch.Tensor,
        blocks: torch.Tensor,
        edge: int,
    ) -> Partial:
        """q [g, R, D] against the key blocks [g, w], the first `edge` of them seen in part."""
        (count, width), size = blocks.shape, self.layout.block_size
        index = blocks.flatten()
        gathered_k = torch.index_select(keys, 0, index, out=self.scratch.take("k", count * width, size, keys.shape[2]))
        gathered_v = torch.index_select(
            values, 0, index, out=self.scratch.take("v", count * width, size, values.shape[2])
        )
        scores = self.scratch.take("scores", count, q.shape[1], width * size)
        torch.bmm(q, gathered_k.view(count, width * size, -1).transpose(1, 2), out=scores)
        cap(scores, self.softcap)
        if self.mask.attn_mask is not None:
            at = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)[:, None]
            rows = self.layout.rows[tasks][:, :, None]
            bias = bias_at(self.mask.attn_mask, *self.index, rows, at.clamp(max=self.layout.key_length - 1))
            scores.add_(bias, alpha=LOG2_E)
        if edge:
            seen = scores[:, :, : edge * size].view(count, -1, edge, size)
            seen.masked_fill_(self._hidden(tasks, blocks[:, :edge]), -torch.inf)
        weights, total, top = exponentiate(scores)
        out = torch.bmm(weights, gathered_v.view(count, width * size, -1))
        return normalise(out, total), lse_of(total, top)

    def _hidden(self, tasks: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[g, R, w, B] bool: keys of blocks [g, w] that a row does not see. Compared as short integers: half the time
        of a tile would go into it otherwise."""
        size, begin = self.layout.block_size, blocks[:, None] * self.layout.block_size
        at = torch.arange(size, dtype=torch.int16, device=blocks.device)
        lo, hi = (
            (bound[tasks][..., None] - begin).clamp(0, size).short()[..., None]
            for bound in (self.layout.lo, self.layout.hi)
        )
        return (at < lo) | (at >= hi)

    def summarized(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        moments: Moments,
        parts: Sequence[SummarizedBlocks],
        pause: Checkpoint,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outliers of blocks that are not kept, and moments for their other keys.

        -> out [nQ, R, Dv], lse [nQ, R] of both and of the outliers alone.
        """
        out = self.scratch.take("summarized", *q.shape[:2], values.shape[2]).zero_()
        lse, read = (q.new_full(q.shape[:2], -torch.inf) for _ in range(2))
        own_k, own_v = (x.flatten(0, 1)[moments.outliers] for x in (keys, values))
        for part in parts:
            step = fitting(SPARSE_TILE_BYTES, q.shape[1] * max(len(part.columns), len(own_k)), q.device)
            for start in range(part.blocks.start, part.blocks.stop, step):
                pause()
                blocks = slice(start, min(start + step, part.blocks.stop))
                exact = self._outliers(q[blocks], own_k, own_v, moments, blocks)
                stand_in = self._centroids(q[blocks], moments, blocks, part.columns)
                filled = [(scores, rows) for scores, rows in (exact, stand_in) if len(rows)]
                if not filled:
                    continue
                top = torch.stack([scores.amax(2) for scores, _ in filled]).amax(0)
                top = top.masked_fill(top == -torch.inf, 0.0)
                totals = [scores.sub_(top[..., None]).exp2_().sum(2) for scores, _ in filled]
                mean = torch.stack([scores @ rows for scores, rows in filled]).sum(0)
                total = torch.stack(totals).sum(0)
                out[blocks], lse[blocks] = normalise(mean, total), lse_of(total, top)
                if len(exact[1]):
                    read[blocks] = lse_of(totals[0], top)
        return out, lse, read

    def _outliers(
        self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, moments: Moments, blocks: slice
    ) -> Partial:
        """q [g, R, D] -> scores [g, R, n] and values [n, Dv] of outliers in blocks that these rows leave."""
        layout, positions = self.layout, moments.outliers
        home = positions // layout.block_size
        others = layout.within(blocks, home, layout.full) & ~self.keep[blocks, home]
        some = others.any(0)
        scores = cap(q @ key[some].T, self.softcap)
        if self.mask.attn_mask is not None:
            rows = layout.rows[blocks][..., None]
            scores.add_(bias_at(self.mask.attn_mask, *self.index, rows, positions[some]), alpha=LOG2_E)
        return scores.add_(_minus_inf_unless(others[:, some])[:, None]), value[some]

    def _centroids(self, q: torch.Tensor, moments: Moments, blocks: slice, columns: torch.Tensor) -> Partial:
        """q [g, R, D] -> estimates [g, R, c] of the blocks that stand beside these rows, and their values [c, Dv]."""
        others = self.layout.within(blocks, columns, self.layout.full) & ~self.keep[blocks, columns]
        some = others.any(0)
        columns = columns[some]
        estimates = moments.estimates(q.flatten(0, 1), columns, self.softcap, self.scratch)
        weight = moments.log_weight[columns] + _minus_inf_unless(others[:, some])
        return estimates.view(*q.shape[:2], -1).add_(weight[:, None]), moments.value[columns]


def _minus_inf_unless(kept: torch.Tensor) -> torch.Tensor:
    return torch.zeros(kept.shape, device=kept.device).masked_fill_(~kept, -torch.inf)
