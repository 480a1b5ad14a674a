"""Exact online softmax over blocks of keys: bounded memory for any mask or bias, interruptible between blocks."""

from __future__ import annotations

import torch

from service.attention.masks import MaskSpec, as_bias, cut, row_bounds
from service.attention.output import AttentionOutput, Checkpoint, no_checkpoint
from service.attention.scores import block_scores, default_scale, fitting, lse_of, normalise, weighted

KEY_BLOCK = 512
MAX_ROWS = 512
SCRATCH_BYTES = 16 * 2**20  # of one block of scores
ALL = slice(None)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq].

    Accumulates in float32 (float64 kept). Ref: online softmax (arXiv 1805.02867).
    """
    batch, heads, query_length, head_dim = query.shape
    scale = default_scale(scale, head_dim)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch, heads, query_length, value.shape[3])
    lse = out.new_empty(batch, heads, query_length, dtype=dtype)
    step = max(1, min(MAX_ROWS, fitting(SCRATCH_BYTES, batch * heads * min(KEY_BLOCK, key.shape[2]), query.device)))
    for start in range(0, query_length, step):
        rows = slice(start, min(start + step, query_length))
        block = query[:, :, rows]
        out[:, :, rows], lse[:, :, rows] = _rows(
            block, key, value, mask, rows, query_length, scale, softcap, checkpoint or no_checkpoint
        )
    return AttentionOutput(out, lse)


def _rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    rows: slice,
    query_length: int,
    scale: float,
    softcap: float | None,
    checkpoint: Checkpoint,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of rows against every block of keys that any of them sees."""
    batch, heads, n, _ = query.shape
    lo, hi = row_bounds(mask, batch, query_length, key.shape[2], rows.start, rows.stop, query.device)
    # every row sees [all_lo, all_hi): inside it no element needs a mask
    first, last, all_lo, all_hi = int(lo.min()), int(hi.max()), int(lo.max()), int(hi.min())
    dtype = torch.promote_types(query.dtype, torch.float32)
    top = torch.full((batch, heads, n), -torch.inf, dtype=dtype, device=query.device)
    total = torch.zeros_like(top)
    acc = torch.zeros(batch, heads, n, value.shape[3], dtype=dtype, device=query.device)
    for k in range(first, last, KEY_BLOCK):
        checkpoint()
        keys = slice(k, min(k + KEY_BLOCK, last))
        bias = None if mask.attn_mask is None else as_bias(cut(mask.attn_mask, ALL, ALL, rows, keys))
        bounds = None if all_lo <= keys.start and keys.stop <= all_hi else (lo[:, None], hi[:, None])
        scores = block_scores(query, key[:, :, keys], scale, softcap, bias, bounds, k, use_units=True)
        new_top = torch.maximum(top, scores.amax(-1))
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # -inf - -inf is NaN
        weights = scores.sub_(base[..., None]).exp2_()
        shrink = torch.exp2(top - base)
        total = total * shrink + weights.sum(-1)
        acc.mul_(shrink[..., None]).add_(weighted(weights, value[:, :, keys]))
        top = new_top
        del scores, weights  # their memory is for the next block
    lse = lse_of(total, top.masked_fill(top == -torch.inf, 0.0))
    return normalise(acc, total).to(query.dtype), lse
