"""Exact attention of chosen rows: what audits compare with and weights are read from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from service.attention.masks import MaskSpec, bias_at, bounds_at
from service.attention.merge import merge
from service.attention.output import Checkpoint, no_checkpoint
from service.attention.scores import block_scores, default_scale, exponentiate, grouped, lse_of, normalise

SCRATCH_BYTES = 16 * 2**20  # of one block of scores


def score_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    b: int,
    rows: torch.Tensor,
    keys: slice,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scores [Hq, R, keys] float32 of rows [Hq, R] of sequence b; hidden ones are -inf."""
    heads, query_length, head_dim = query.shape[1:]
    chosen = query[b].gather(1, rows[..., None].expand(-1, -1, head_dim))
    head = torch.arange(heads, device=rows.device)[:, None, None]
    columns = torch.arange(keys.start, keys.stop, device=rows.device)
    bias = None if mask.attn_mask is None else bias_at(mask.attn_mask, b, head, rows[..., None], columns)
    scores = block_scores(
        chosen[None], key[b : b + 1, :, keys], default_scale(scale, head_dim), softcap, bias,
        row_limits(mask, b, rows, query_length, key.shape[2]), keys.start,
    )  # fmt: skip
    return scores[0]


def row_limits(
    mask: MaskSpec, b: int, rows: torch.Tensor, query_length: int, key_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi) [Hq, R] of rows [Hq, R] of sequence b."""
    lo, hi = bounds_at(mask, rows[None], query_length, key_length)
    which = b if lo.shape[0] > 1 else 0
    return lo[which], hi[which]


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    b: int,
    rows: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [Hq, R, Dv], lse [Hq, R], float32, of rows [Hq, R] of sequence b, exactly."""
    heads, count = rows.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(heads, count, value.shape[3], dtype=dtype, device=query.device)
    lse = torch.full((heads, count), -torch.inf, dtype=dtype, device=query.device)
    lo, hi = row_limits(mask, b, rows, query.shape[2], key.shape[2])
    for keys in key_chunks(heads * count, int(lo.min()), int(hi.max())):
        (checkpoint or no_checkpoint)()
        weights, total, top = exponentiate(score_rows(query, key, mask, b, rows, keys, scale, softcap))
        part = normalise(grouped(weights[None], value[b : b + 1, :, keys].to(dtype))[0], total)
        out, lse = merge(out, lse, part, lse_of(total, top))
    return out, lse


def key_chunks(rows: int, first: int, last: int) -> Iterator[slice]:
    """Ranges of keys whose scores with so many rows fit the scratch."""
    step = max(1, SCRATCH_BYTES // (4 * rows))
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))
