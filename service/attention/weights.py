"""Attention weights of chosen rows, whole or only the largest of them, or the scores at an earlier stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from service.attention.masks import MaskSpec, bias_at
from service.attention.output import Checkpoint, no_checkpoint
from service.attention.rows import SCRATCH_BYTES, row_limits, score_rows
from service.attention.scores import default_scale, exponentiate, grouped, normalise
from service.errors import invalid

if TYPE_CHECKING:
    from service.core.options import ScoreStage

Block = tuple[int, slice, torch.Tensor]  # sequence, positions in `rows`, values [Hq, R', its keys]


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None = None,
    *,
    stage: ScoreStage = "softmax",
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> torch.Tensor:
    """[B, Hq, R, Lk] float32: softmax weights of `rows` (None: all), or their scores at another `stage`.

    Rows without keys are zeros; scores of keys that the stage hides are -inf, see `stage_scores`.
    """
    batch, heads = query.shape[:2]
    count = query.shape[2] if rows is None else len(rows)
    out = torch.full((batch, heads, count, key.shape[2]), _hidden(stage), device=query.device)
    for b, part, values in _blocks(query, key, mask, rows, stage, scale, softcap, checkpoint or no_checkpoint):
        out[b, :, part, : values.shape[-1]] = values
    return out


def top_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None = None,
    top_k: int = 10,
    *,
    stage: ScoreStage = "softmax",
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [B, Hq, R, k] float32, largest first, and key indices int64, ranked by the values of `stage`.

    Where the stage shows fewer keys the index is -1 and the value 0.0, or -inf for scores.
    """
    batch, heads = query.shape[:2]
    count = query.shape[2] if rows is None else len(rows)
    hidden = _hidden(stage)
    top = torch.full((batch, heads, count, top_k), hidden, device=query.device)
    indices = torch.full((batch, heads, count, top_k), -1, device=query.device)
    for b, part, values in _blocks(query, key, mask, rows, stage, scale, softcap, checkpoint or no_checkpoint):
        kept = min(top_k, values.shape[-1])
        best, where = values.topk(kept, dim=-1)
        top[b, :, part, :kept] = best
        indices[b, :, part, :kept] = where.masked_fill(best == hidden, -1)
    return top, indices


def _hidden(stage: ScoreStage) -> float:
    return 0.0 if stage == "softmax" else -torch.inf


def stage_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    b: int,
    rows: torch.Tensor,
    stage: ScoreStage,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scores [Hq, R, n] float32 in nats of rows [Hq, R] of sequence b and its n valid keys, up to `stage`.

    raw: scale * q k^T. capped: c * tanh(raw / c). masked: capped + bias, -inf where the mask hides the key; the other
    two hide none. Raises FarsightError (422) where a score that is shown overflows.
    """
    # not `score_rows`: its bits overflow where a bias is float32's lowest number, and nats do not
    heads, query_length, head_dim = query.shape[1:]
    valid = key.shape[2] if mask.kv_lengths is None else int(mask.kv_lengths.expand(query.shape[0])[b])
    dtype = torch.promote_types(query.dtype, torch.float32)
    chosen = query[b].gather(1, rows[..., None].expand(-1, -1, head_dim)).to(dtype) * default_scale(scale, head_dim)
    keys = key[b : b + 1, :, :valid].to(dtype)  # cut, not masked: what lies behind is never read
    scores = grouped(chosen[None], keys.transpose(-1, -2))[0]
    if stage != "raw" and softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if stage == "masked":
        columns = torch.arange(valid, device=rows.device)
        if mask.attn_mask is not None:
            head = torch.arange(heads, device=rows.device)[:, None, None]
            scores.add_(bias_at(mask.attn_mask, b, head, rows[..., None], columns))
        lo, hi = row_limits(mask, b, rows, query_length, key.shape[2])
        scores.masked_fill_((columns < lo[..., None]) | (columns >= hi[..., None]), -torch.inf)
    _check_finite(scores, stage)
    return scores


def _check_finite(scores: torch.Tensor, stage: ScoreStage) -> None:
    """-inf means hidden, so where nothing is hidden it is an overflow like any other."""
    if not scores.numel():
        return
    low, high = (float(bound) for bound in torch.aminmax(scores))
    if high != high or high == torch.inf or (low == -torch.inf and stage != "masked"):
        raise invalid(f"the {stage} scores overflow their type (query, key, scale, softcap)", code="non_finite")


def _blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: tuple[int, ...] | None,
    stage: ScoreStage,
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
            if stage != "softmax":
                yield b, part, stage_scores(query, key, mask, b, chosen, stage, scale, softcap)
                continue
            scores = score_rows(query, key, mask, b, chosen, slice(0, key_length), scale, softcap)
            weights, total, _ = exponentiate(scores)
            yield b, part, normalise(weights, total)
