"""Attention weights of chosen rows, whole or only the largest of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from service.attention.masks import MaskSpec
from service.attention.output import Checkpoint, no_checkpoint
from service.attention.rows import SCRATCH_BYTES, score_rows
from service.attention.scores import exponentiate, normalise

Block = tuple[int, slice, torch.Tensor]  # sequence, positions in `rows`, weights [Hq, R', Lk]


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> torch.Tensor:
    """[B, Hq, R, Lk] float32: softmax weights of `rows` (None: all); rows without keys are zeros."""
    batch, heads = query.shape[:2]
    count = query.shape[2] if rows is None else len(rows)
    out = torch.zeros(batch, heads, count, key.shape[2], device=query.device)
    for b, part, weights in _blocks(query, key, mask, rows, scale, softcap, checkpoint or no_checkpoint):
        out[b, :, part] = weights
    return out


def top_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None = None,
    top_k: int = 10,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [B, Hq, R, k] float32, largest first, and key indices int64; 0.0 and -1 where fewer keys are visible."""
    batch, heads = query.shape[:2]
    count = query.shape[2] if rows is None else len(rows)
    values = torch.zeros(batch, heads, count, top_k, device=query.device)
    indices = torch.full((batch, heads, count, top_k), -1, device=query.device)
    kept = min(top_k, key.shape[2])
    for b, part, weights in _blocks(query, key, mask, rows, scale, softcap, checkpoint or no_checkpoint):
        best, where = weights.topk(kept, dim=-1)
        values[b, :, part, :kept] = best
        indices[b, :, part, :kept] = where.masked_fill(best == 0, -1)
    return values, indices


def _blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None,
    scale: float | None,
    softcap: float | None,
    checkpoint: Checkpoint,
) -> Iterator[Block]:
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    wanted = torch.arange(query_length) if rows is None else torch.tensor(rows, dtype=torch.int64)
    wanted = wanted.to(query.device)
    step = max(1, SCRATCH_BYTES // (4 * heads * key_length))
    for b in range(batch):
        for start in range(0, len(wanted), step):
            checkpoint()
            part = slice(start, min(start + step, len(wanted)))
            chosen = wanted[part].expand(heads, -1)
            scores = score_rows(query, key, mask, b, chosen, slice(0, key_length), scale, softcap)
            weights, total, _ = exponentiate(scores)
            yield b, part, normalise(weights, total)
