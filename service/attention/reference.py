"""Eager n x n attention: this defines what is correct. Slow, readable, float64 where the inputs are."""

from __future__ import annotations

import torch

from service.attention.masks import MaskSpec, row_bounds
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Scoring


def visible(mask: MaskSpec, batch: int, query_length: int, key_length: int) -> torch.Tensor:
    """[B, 1, Lq, Lk] bool: the index part of the mask."""
    lo, hi = row_bounds(mask, batch, query_length, key_length)
    columns = torch.arange(key_length)
    return ((columns >= lo[..., None]) & (columns < hi[..., None]))[:, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    *,
    scoring: Scoring = DEFAULT_SCORING,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]; in the inputs' own precision throughout.

    Ref: softmax(softcap(scale q k^T) + mask) v; a row with no key is zeros with lse -inf.
    """
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)

    scores = query @ key.transpose(-1, -2) * scoring.scale_for(head_dim)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    seen = visible(mask, batch, query_length, key_length)
    if mask.attn_mask is not None and mask.attn_mask.dtype == torch.bool:
        seen = seen & mask.attn_mask
    elif mask.attn_mask is not None:
        scores = scores + mask.attn_mask
    scores = scores.masked_fill(~seen, -torch.inf)

    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    # a NaN in a hidden value must not reach the row through 0 * NaN
    value = value.masked_fill(~seen.any(-2).expand(batch, heads, key_length)[..., None], 0.0)
    out = (weights.to(query.dtype) @ value).to(query.dtype)
    return AttentionOutput(out, lse.to(torch.promote_types(query.dtype, torch.float32)))
