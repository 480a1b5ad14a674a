"""The query heads that share one key head: what they owe to leaves, which leaves they read, and what comes out.

Every row is scored against every leaf that it sees in full. A block of rows reads a leaf where leaving it
would cost more than a threshold: its share of the rows' mass, squared, times how unevenly they weigh its keys and how
far its values lie from their output. The rest is answered for by its estimated mass and its mean value. Rows read
outliers, and keys that only some of a tile's rows see, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import NamedTuple

import torch

from service.attention.geometry import LEAF_TILE_BYTES, SPARSE_TILE_BYTES
from service.attention.output import Checkpoint
from service.attention.scores import Scratch, fitting
from service.attention.sparse.leaves import Leaves

LOOKED_AT = 8  # every 8th row's output stands for its neighbours' where the distance of values is judged
LARGEST_VARIATION = 1e4  # of the weights inside a leaf, over their squared mean
LARGEST_SUM = 1e30  # of weights: beyond it they are taken relative to something larger


@dataclass(frozen=True, slots=True)
class Masses:
    """Of n rows, heads first, and of c leaves; all relative to 2^top."""

    leaves: slice
    estimate: torch.Tensor  # [n, c]: of the leaves
    top: torch.Tensor  # [n, 1], bits
    exact: torch.Tensor  # [n, Dv]: sum of the weighted values that are read whatever is chosen
    exact_total: torch.Tensor  # [n, 1]: of their weights
    outliers: int  # that each row reads

    @property
    def total(self) -> torch.Tensor:
        return self.exact_total + self.estimate.sum(1, keepdim=True)


class Rows(NamedTuple):
    """What came out."""

    out: torch.Tensor  # [g, R, Dv]
    mass: torch.Tensor  # [g, R]: log2 of all of it
    read: torch.Tensor  # [g, R]: log2 of what was read, the rest is estimated
    scored: int  # pairs; a leaf that is not read counts as one key
    kept: torch.Tensor | None = None  # [g, blocks, c] bool: the leaves that each block of rows has read


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """g query heads and their key head; Lp rows: those of the queries, filled up to whole blocks."""

    leaves: Leaves
    query: torch.Tensor  # [g, Lp, D], mapped, in bits
    square: torch.Tensor  # [g, Lp, 1]: |q|^2; of outsized queries less
    near: torch.Tensor  # [g, Lp, Dv]: output of the keys that only some rows of a tile see
    near_mass: torch.Tensor  # [g, Lp], log2
    scratch: Scratch

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def block(self) -> int:
        """Rows that share a choice."""
        return self.leaves.shape.rows

    def of_heads(self, heads: Sequence[int]) -> KeyGroup:
        index = torch.tensor(heads, device=self.query.device)
        query, square, near, near_mass = (
            tensor.index_select(0, index) for tensor in (self.query, self.square, self.near, self.near_mass)
        )
        return replace(self, query=query, square=square, near=near, near_mass=near_mass)

    def masses(self, rows: slice, segments: range, faith: torch.Tensor) -> Masses:
        """faith [g]: the share of a leaf's variance that raises its estimated mass. The estimate is scratch."""
        leaves, query = self.leaves, self.query[:, rows]
        at, apart = leaves.near(segments), leaves.apart(segments)
        square = self.square[:, rows]
        scored = torch.cat((query, faith[:, None, None] * square, torch.ones_like(square)), 2).flatten(0, 1)
        count = len(scored)
        estimate = self.scratch.take("estimate", count, at.stop - at.start)
        torch.mm(scored, leaves.scorer[at].T, out=estimate)
        near_mass = self.near_mass[:, rows].reshape(count, 1)
        top = torch.maximum(near_mass, estimate.amax(1, keepdim=True))
        outliers = apart.stop - apart.start
        weights = self.scratch.take("outliers", count, outliers)
        if outliers:
            torch.mm(query.reshape(count, -1), leaves.outlier_keys[apart].T, out=weights)
            top = torch.maximum(top, weights.amax(1, keepdim=True))
        weights.sub_(top).exp2_()
        estimate.sub_(top).exp2_()
        near = (near_mass - top).exp2_()
        exact = (near * self.near[:, rows].reshape(count, -1)).addmm_(weights, leaves.outlier_values[apart])
        return Masses(at, estimate, top, exact, near + weights.sum(1, keepdim=True), outliers)

    def risks(self, rows: slice, masses: Masses) -> torch.Tensor:
        """[blocks, c]: the squared error of a block's output that each leaf may cause if it is not read."""
        leaves, at, estimate = self.leaves, masses.leaves, masses.estimate
        total = masses.total
        rows_of, width = self.block, estimate.shape[1]
        blocks = len(total) // rows_of
        squared = torch.mul(estimate, estimate, out=self.scratch.take("squared", *estimate.shape))
        inverse = total.square().reciprocal_().view(blocks, 1, rows_of)
        share = torch.bmm(inverse, squared.view(blocks, rows_of, width))[:, 0]

        looked = slice(LOOKED_AT // 2, None, LOOKED_AT)
        some = estimate.view(blocks, rows_of, width)[:, looked] @ leaves.mean[at]
        some = (some + masses.exact.view(blocks, rows_of, -1)[:, looked]) / total.view(blocks, rows_of, 1)[:, looked]
        away = leaves.mean_square[at] - 2 * some.mean(1) @ leaves.mean[at].T
        away += some.square().sum(2).mean(1, keepdim=True)

        square = self.square[:, rows].reshape(blocks, rows_of).mean(1, keepdim=True)
        uneven = (square * (2 * log(2)) * leaves.scorer[at, -2]).expm1_().clamp_(max=LARGEST_VARIATION)
        size = leaves.shape.size
        return share.mul_((uneven * away.clamp_(min=0)).addcmul_(uneven.clamp(max=size), leaves.spread[at])) / size

    def attend(
        self, rows: slice, segments: range, faith: torch.Tensor, threshold: torch.Tensor, pause: Checkpoint
    ) -> Rows:
        """Whole blocks of rows that see the same segments; faith and threshold [g]."""
        masses = self.masses(rows, segments, faith)
        count = rows.stop - rows.start
        # written so that NaN is read
        keep = ~(self.risks(rows, masses) <= threshold.repeat_interleave(count // self.block)[:, None])
        blocks, width = keep.shape
        keep[:: count // self.block, -1] = True  # the keys just before the first rows
        masses.estimate.view(blocks, self.block, width).mul_((~keep).to(masses.estimate.dtype)[:, None])
        stand_in = masses.estimate.sum(1, keepdim=True)
        out = torch.addmm(masses.exact, masses.estimate, self.leaves.mean[masses.leaves])
        total, top = masses.exact_total + stand_in, masses.top
        query = torch.cat((self.query[:, rows].flatten(0, 1), torch.ones_like(top), -top), 1)
        counts = keep.sum(1).tolist()
        chosen = (keep.nonzero()[:, 1] + masses.leaves.start).split(counts)
        for block, leaves in enumerate(chosen):
            if len(leaves):
                pause()
                own = slice(block * self.block, (block + 1) * self.block)
                self._read(query[own], leaves, out[own], total[own], stand_in[own], top[own])
        read = (total - stand_in).clamp_(min=0).log2_() + top
        out /= total
        scored = sum(counts) * self.block * self.leaves.shape.size + len(query) * (width + masses.outliers)
        shape = self.heads, count
        kept = keep.view(self.heads, -1, width)
        return Rows(out.view(*shape, -1), (total.log2_() + top).view(shape), read.view(shape), scored, kept)

    def step(self, segments: range) -> int:
        """Rows to compute at a time."""
        leaves = self.leaves.near(segments)
        numbers = self.heads * self.block * (leaves.stop - leaves.start)
        return self.block * fitting(LEAF_TILE_BYTES, numbers, self.query.device)

    def _read(
        self,
        query: torch.Tensor,
        leaves: torch.Tensor,
        out: torch.Tensor,
        total: torch.Tensor,
        stand_in: torch.Tensor,
        top: torch.Tensor,
    ) -> None:
        """query [R, D + 2] -> adds the keys of some leaves to out [R, Dv], total, stand_in and top [R, 1]."""
        size, rows, width = self.leaves.shape.size, len(query), query.shape[1]
        step = fitting(SPARSE_TILE_BYTES, rows * size, query.device)
        for part in (leaves,) if len(leaves) <= step else leaves.split(step):  # type: ignore[no-untyped-call]
            both = torch.index_select(
                self.leaves.both, 0, part, out=self.scratch.take("both", len(part), self.leaves.both.shape[1])
            ).view(len(part) * size, -1)
            keys, values = both[:, :width], both[:, width:]
            weights = torch.mm(query, keys.T, out=self.scratch.take("weights", rows, len(part) * size)).exp2_()
            added = weights.sum(1, keepdim=True)
            if not float(added.amax()) < LARGEST_SUM:  # far above all that was expected
                torch.mm(query, keys.T, out=weights)
                above = weights.amax(1, keepdim=True).clamp_(min=0)
                weights.sub_(above).exp2_()
                added = weights.sum(1, keepdim=True)
                top += above
                query[:, -1:] -= above
                for sums in (out, total, stand_in):
                    sums *= (-above).exp2()
            out.addmm_(weights, values)
            total += added
