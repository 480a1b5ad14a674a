"""Packed and ragged batches as segments that share nothing: neighbours cannot influence each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from service.attention.inputs import ALL, Tensors
from service.attention.masks import MaskSpec, cut
from service.attention.output import AttentionOutput


@dataclass(frozen=True, slots=True)
class Segment:
    """One attention of its own: sequences `batch`, rows `rows` of the whole; its mask has no lengths and no packing."""

    batch: slice
    rows: slice
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskSpec

    @property
    def tensors(self) -> Tensors:
        return self.query, self.key, self.value

    @property
    def has_keys(self) -> bool:
        return self.key.shape[2] > 0

    @property
    def visible_pairs(self) -> int:
        """Over all heads."""
        batch, heads, query_length, _ = self.query.shape
        return batch * heads * self.mask.visible_pairs(query_length, self.key.shape[2])


def split(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: MaskSpec) -> list[Segment]:
    """One segment a packed sequence, or one for each ragged one; keys past kv_lengths are never read."""

    def segment(batch: slice, rows: slice, keys: slice) -> Segment:
        own = index_only
        if mask.attn_mask is not None:
            own = replace(own, attn_mask=cut(mask.attn_mask, batch, ALL, rows, keys))
        return Segment(batch, rows, query[batch, :, rows], key[batch, :, keys], value[batch, :, keys], own)

    if mask.kv_lengths is None and mask.cu_seqlens_q is None:
        return [Segment(slice(0, query.shape[0]), slice(0, query.shape[2]), query, key, value, mask)]
    index_only = replace(mask, kv_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, attn_mask=None)
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        cu_q, cu_k = mask.cu_seqlens_q, mask.cu_seqlens_k
        if cu_q[-1] != query.shape[2] or cu_k[-1] != key.shape[2] or query.shape[0] != 1 or len(cu_q) != len(cu_k):
            raise ValueError(f"cu_seqlens: {cu_q} and {cu_k} do not cover {query.shape[2]} rows, {key.shape[2]} keys")
        starts = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
        return [segment(slice(0, 1), slice(q, q_end), slice(k, k_end)) for q, q_end, k, k_end in starts if q_end > q]
    assert mask.kv_lengths is not None, "bug: cu_seqlens of queries without those of keys"
    lengths: list[int] = mask.kv_lengths.tolist()
    rows = slice(0, query.shape[2])
    if len(set(lengths)) == 1:
        return [segment(slice(0, query.shape[0]), rows, slice(0, lengths[0]))]
    return [segment(slice(b, b + 1), rows, slice(0, length)) for b, length in enumerate(lengths)]


def join(
    query: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], run: Callable[[Segment], AttentionOutput]
) -> AttentionOutput:
    """Run each segment by itself into one preallocated output."""
    batch, heads, query_length, _ = query.shape
    if len(segments) == 1 and segments[0].has_keys and segments[0].query.shape[:3] == query.shape[:3]:
        return run(segments[0])
    out = query.new_zeros(batch, heads, query_length, value.shape[3])
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full((batch, heads, query_length), -torch.inf, dtype=dtype, device=query.device)
    lse_read: torch.Tensor | None = None
    pairs: int | None = None
    visible = 0
    risky: list[torch.Tensor] = []
    for segment in segments:
        if not segment.has_keys:
            continue
        part = run(segment)
        out[segment.batch, :, segment.rows] = part.out
        lse[segment.batch, :, segment.rows] = part.lse
        if part.pairs_scored is not None:
            pairs = (pairs or 0) + part.pairs_scored
            visible += segment.visible_pairs
        if part.lse_read is not None:
            lse_read = torch.full_like(lse, -torch.inf) if lse_read is None else lse_read
            lse_read[segment.batch, :, segment.rows] = part.lse_read
        if part.risky_rows is not None:
            start = torch.tensor([segment.batch.start, 0, segment.rows.start], device=part.risky_rows.device)
            risky.append(part.risky_rows + start)
    density = None if pairs is None else pairs / max(visible, 1)
    return AttentionOutput(out, lse, density, pairs, torch.cat(risky) if risky else None, lse_read)
