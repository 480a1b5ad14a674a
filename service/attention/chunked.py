"""Exact online softmax over blocks of keys: bounded memory for any mask or bias, interruptible between blocks."""

from __future__ import annotations

import torch

from service.attention.geometry import CHUNK_BYTES, CHUNK_KEYS, CHUNK_ROWS
from service.attention.masks import MaskSpec, as_bias, cut, row_bounds
from service.attention.merge import Partial
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring, no_checkpoint
from service.attention.scores import block_scores, fitting, lse_of, normalise, weighted

ALL = slice(None)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq].

    Accumulates in float32 (float64 kept). Ref: online softmax (arXiv 1805.02867).
    """
    batch, heads, query_length, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch, heads, query_length, value.shape[3])
    lse = out.new_empty(batch, heads, query_length, dtype=dtype)
    step = min(CHUNK_ROWS, fitting(CHUNK_BYTES, batch * heads * min(CHUNK_KEYS, key.shape[2]), query.device))
    for start in range(0, query_length, step):
        rows = slice(start, min(start + step, query_length))
        out[:, :, rows], lse[:, :, rows] = _attend_rows(
            query, key, value, mask, rows, scoring, checkpoint or no_checkpoint
        )
    return AttentionOutput(out, lse)


def _attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    rows: slice,
    scoring: Scoring,
    checkpoint: Checkpoint,
) -> Partial:
    """One block of rows against every block of keys that any of them sees."""
    batch, query_length = query.shape[0], query.shape[2]
    lo, hi = row_bounds(mask, batch, query_length, key.shape[2], rows.start, rows.stop, query.device)
    # every row sees [all_lo, all_hi): no element in it needs a mask
    first, last, all_lo, all_hi = int(lo.min()), int(hi.max()), int(lo.max()), int(hi.min())
    query = query[:, :, rows]
    dtype = torch.promote_types(query.dtype, torch.float32)
    top = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    total = torch.zeros_like(top)
    acc = torch.zeros(*query.shape[:3], value.shape[3], dtype=dtype, device=query.device)
    for k in range(first, last, CHUNK_KEYS):
        checkpoint()
        keys = slice(k, min(k + CHUNK_KEYS, last))
        bias = None if mask.attn_mask is None else as_bias(cut(mask.attn_mask, ALL, ALL, rows, keys))
        bounds = None if all_lo <= keys.start and keys.stop <= all_hi else (lo[:, None], hi[:, None])
        scores = block_scores(query, key[:, :, keys], scoring, bias, bounds, k, use_units=True)
        new_top = torch.maximum(top, scores.amax(-1))
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # -inf - -inf is NaN
        weights = scores.sub_(base[..., None]).exp2_()
        shrink = torch.exp2(top - base)
        total = total * shrink + weights.sum(-1)
        acc.mul_(shrink[..., None]).add_(weighted(weights, value[:, :, keys]))
        top = new_top
        del scores, weights  # the next block needs their memory
    lse = lse_of(total, top.masked_fill(top == -torch.inf, 0.0))
    return normalise(acc, total).to(query.dtype), lse
