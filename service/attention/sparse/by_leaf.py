"""Sparse attention by leaves, of one segment: prepared once, then run for an error as often as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt
from typing import Self

import torch
from torch.nn.functional import pad

from service.attention import dense
from service.attention.block_map import BlockMap, seen
from service.attention.geometry import LEAF_BYTES, leaf_bytes, leaf_shape
from service.attention.inputs import AttentionInputs
from service.attention.merge import merge
from service.attention.output import AttentionOutput, Checkpoint
from service.attention.rows import RowSet, attend_rows
from service.attention.scores import LOG2_E, Scratch
from service.attention.sparse.attend import risky_rows
from service.attention.sparse.key_group import KeyGroup, Rows
from service.attention.sparse.leaves import leaves_of
from service.attention.sparse.pilot import Choice, Curve, choose, curves, pilots
from service.attention.sparse.tiles import Tile, tiles

PADDED = 1e4  # log2 of the mass of rows that fill the last block: nothing is left for leaves
SETTLED = 4  # the square root of the rows, over this: so many are computed exactly, those that read the least
LARGEST_SQUARE = 4.0  # times the mean of a head's queries: longer ones raise an estimate no further
LOOKED_AT = 2  # key heads: if all heads of theirs are diffuse, all are
FEWEST_TILES = 7  # with keys that are far from all their rows; fewer: too little can be saved


def bytes_of(inputs: AttentionInputs) -> int:
    """What `LeafAttention` keeps."""
    query, key, value = inputs.tensors
    return leaf_bytes((*query.shape[:2], *key.shape[1:2], query.shape[2], key.shape[2]), query.shape[3], value.shape[3])


def tiles_of(inputs: AttentionInputs, held: int = 0) -> list[Tile]:
    """Empty if leaves are of no use: they know neither an attn_mask nor a softcap, and need keys that are far; or if
    they would need more memory than there is beside the bytes that are held."""
    query, key, _ = inputs.tensors
    shape = leaf_shape(key.shape[2])
    if inputs.mask.attn_mask is not None or inputs.scoring.softcap is not None:
        return []
    if min(query.shape[2], key.shape[2]) <= FEWEST_TILES * shape.segment:
        return []
    if held + bytes_of(inputs) > LEAF_BYTES:
        return []
    found = list(tiles(inputs.mask, query.shape[2], key.shape[2], shape, query.device))
    return found if sum(bool(tile.segments) for tile in found) >= FEWEST_TILES else []


@dataclass(frozen=True, slots=True)
class LeafAttention:
    """One attention without kv_lengths and packing, ready to run. Lp rows: filled up to whole blocks."""

    inputs: AttentionInputs
    tiles: Sequence[Tile]
    out: torch.Tensor  # [B, Hq, Lp, Dv] float32: of the keys that only some rows of a tile see
    mass: torch.Tensor  # [B, Hq, Lp]: of the same, log2
    near_pairs: int  # of one head
    groups: Sequence[KeyGroup]  # B * Hkv
    curves: Sequence[Curve]  # B * Hq

    @classmethod
    def of(
        cls,
        inputs: AttentionInputs,
        parts: Sequence[Tile],
        max_error: float,
        max_density: float | None,
        pause: Checkpoint,
    ) -> Self | None:
        """`parts`: from `tiles_of`. None: the first heads would all be exact, and none of the others is looked at."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs.tensors)
        inputs = replace(inputs, query=query, key=key, value=value)
        shape = leaf_shape(key.shape[2])
        near = _Near.of(inputs, -(-query.shape[2] // shape.rows) * shape.rows)
        first = pilots(parts)
        near.fill(inputs, first, pause)
        bits = inputs.scoring.scale_for(query.shape[3]) * LOG2_E
        heads = query.shape[1] // key.shape[1]
        groups, found, scratch = [], [], Scratch(query.device)
        for b, h in product(range(query.shape[0]), range(key.shape[1])):
            pause()
            own = slice(h * heads, (h + 1) * heads)
            rows = query[b, own].float() * bits
            leaves = leaves_of(rows, key[b, h].float(), value[b, h].float(), shape, pause)
            mapped = pad(rows, (0, 0, 0, near.mass.shape[2] - rows.shape[1])) @ leaves.to_queries
            square = mapped.square().sum(2, keepdim=True)
            square.clamp_(max=LARGEST_SQUARE * square.mean(1, keepdim=True))
            groups.append(KeyGroup(leaves, mapped, square, near.out[b, own], near.mass[b, own], scratch))
            found += curves(groups[-1], first, pause)
            is_enough = len(groups) == min(LOOKED_AT, query.shape[0] * key.shape[1])
            if is_enough and not any(choose(found, max_error, max_density)):
                return None
        near.fill(inputs, [tile for tile in parts if tile not in first], pause)
        seen = sum(int((tile.bounds[1] - tile.bounds[0]).sum()) for tile in parts)
        far = sum(len(tile.segments) * shape.segment * (tile.rows.stop - tile.rows.start) for tile in parts)
        return cls(inputs, parts, near.out, near.mass, seen - far, groups, found)

    def choose(self, max_error: float, max_density: float | None) -> list[Choice | None]:
        """Of each head of each sequence; None: exact attention is cheaper."""
        return choose(self.curves, max_error, max_density)

    def attend(
        self, choices: Sequence[Choice | None], pause: Checkpoint, into: BlockMap | None = None
    ) -> AttentionOutput:
        """Heads without a choice are zeros, for the caller to fill. What is read is drawn `into` a map."""
        batch, heads, length, _ = self.inputs.query.shape
        out, lse = self.out[:, :, :length].clone(), self.mass[:, :, :length].clone()
        read, pairs = lse.clone(), 0
        per_group = batch * heads // len(self.groups)
        if into is not None:
            self._draw_near(into)
        for index, group in enumerate(self.groups):
            first = index * per_group
            chosen = {head: choice for head in range(per_group) if (choice := choices[first + head]) is not None}
            if chosen:
                own = group if len(chosen) == per_group else group.of_heads(list(chosen))
                places = torch.tensor(list(chosen), device=out.device) + first
                whole = Rows(out.flatten(0, 1), lse.flatten(0, 1), read.flatten(0, 1), 0)
                drawn = None if into is None else _Drawing.of(into, own, places % heads, first // heads)
                pairs += self._far(own, list(chosen.values()), places, whole, drawn, pause)
                pairs += len(chosen) * self.near_pairs
        missing = [head for head, choice in enumerate(choices) if choice is None]
        out.flatten(0, 1)[missing] = 0
        lse, read = lse / LOG2_E, read / LOG2_E
        pairs += self._settle(out, lse, read, pause) * (len(choices) - len(missing)) // len(choices)
        visible = self.inputs.mask.visible_pairs(length, self.inputs.key.shape[2])
        density = min(1.0, (pairs + len(missing) * visible) / max(1, batch * heads * visible))
        return AttentionOutput(out.to(self.inputs.query.dtype), lse, density, pairs, risky_rows(lse, read), read)

    def _far(
        self,
        group: KeyGroup,
        chosen: Sequence[Choice],
        places: torch.Tensor,
        whole: Rows,
        drawn: _Drawing | None,
        pause: Checkpoint,
    ) -> int:
        """Adds the keys of whole segments to the heads `places` [g] of [B * Hq, L, ...]. Returns the pairs scored."""
        faith = group.query.new_tensor([choice.faith for choice in chosen])
        threshold = group.query.new_tensor([choice.threshold for choice in chosen])
        pairs = 0
        for tile in self.tiles:
            if not tile.segments:
                continue
            step = group.step(tile.segments)
            for start in range(tile.rows.start, tile.rows.stop, step):
                pause()
                stop = min(start + step, tile.rows.stop)
                padded = slice(start, start - (start - stop) // group.block * group.block)
                rows = group.attend(padded, tile.segments, faith, threshold, pause)
                for tensor, part in zip(whole[:3], rows[:3], strict=True):
                    tensor[places, start:stop] = part[:, : stop - start]
                pairs += rows.scored
                if drawn is not None and rows.kept is not None:
                    drawn.add(rows.kept, group.leaves.near(tile.segments), padded.start, group.block)
        return pairs

    def _draw_near(self, into: BlockMap) -> None:
        for tile in self.tiles:
            rows = torch.arange(tile.rows.start, tile.rows.stop + 1, device=into.rows.device)
            for keys in tile.near:
                into.add(seen(*tile.bounds, into.keys.clamp(keys.start, keys.stop))[:, None], rows)

    def _settle(self, out: torch.Tensor, lse: torch.Tensor, read: torch.Tensor, pause: Checkpoint) -> int:
        """Computes the rows of each head that read the least of their mass exactly. Returns the pairs scored.

        Rows that are no numbers come first: a query far longer than the others can lose all its mass to an estimate.
        """
        lost = out.isnan().any(3)
        count, pairs = min(out.shape[2], isqrt(out.shape[2]) // SETTLED + 1), 0
        index = (read - lse).nan_to_num(0.0).masked_fill_(lost, -torch.inf).topk(count, dim=2, largest=False).indices
        for b in range(len(out)):
            rows = RowSet(b, index[b])
            exact, exact_lse = attend_rows(self.inputs, rows, checkpoint=pause)
            out[b].scatter_(1, index[b][..., None].expand(exact.shape), exact.to(out.dtype))
            for tensor in (lse, read):
                tensor[b].scatter_(1, index[b], exact_lse.to(tensor.dtype))
            lo, hi = rows.limits(self.inputs.mask, out.shape[2], self.inputs.key.shape[2])
            pairs += int((hi - lo).sum())
        return pairs


@dataclass(frozen=True, slots=True)
class _Drawing:
    """Draws what some heads of one sequence read."""

    into: BlockMap  # of the sequence
    heads: torch.Tensor  # [g]
    of_leaf: torch.Tensor  # [n, c]: keys of each leaf by tile

    @classmethod
    def of(cls, into: BlockMap, group: KeyGroup, heads: torch.Tensor, sequence: int) -> Self:
        return cls(into.of_batch(slice(sequence, sequence + 1)), heads, group.leaves.tiles(into.keys))

    def add(self, kept: torch.Tensor, leaves: slice, start: int, block: int) -> None:
        """kept [g, blocks, c] of leaves; the rows begin at `start`."""
        rows = start + block * torch.arange(kept.shape[1] + 1, device=kept.device)
        rows = rows.clamp(max=self.into.rows[-1])
        pairs = kept.float() @ self.of_leaf[leaves] * rows.diff()[:, None]
        self.into.add(pairs[None], rows, self.heads)


@dataclass(frozen=True, slots=True)
class _Near:
    """Exact attention to the keys that only some rows of a tile see."""

    out: torch.Tensor  # [B, Hq, Lp, Dv]
    mass: torch.Tensor  # [B, Hq, Lp], log2

    @classmethod
    def of(cls, inputs: AttentionInputs, padded: int) -> _Near:
        """Nothing yet, of so many rows."""
        query, _, value = inputs.tensors
        out = torch.zeros(*query.shape[:2], padded, value.shape[3], device=query.device)
        mass = torch.full(out.shape[:3], -torch.inf, device=query.device)
        mass[:, :, query.shape[2] :] = PADDED
        return cls(out, mass)

    def fill(self, inputs: AttentionInputs, parts: Iterable[Tile], pause: Checkpoint) -> None:
        query, key, value = inputs.tensors
        scale = inputs.scoring.scale_for(query.shape[3])
        for tile in parts:
            lo, hi = tile.bounds
            for b in range(len(query)):
                pause()
                one = slice(b, b + 1)
                own = one, slice(None), tile.rows
                for index, keys in enumerate(tile.near):
                    size = keys.stop - keys.start
                    bounds = (lo - keys.start).clamp(0, size), (hi - keys.start).clamp(0, size)
                    part = dense.attend_between(query[own], key[one, :, keys], value[one, :, keys], bounds, scale)
                    self.out[own], self.mass[own] = merge(self.out[own], self.mass[own], *part) if index else part
                self.mass[own] *= LOG2_E
