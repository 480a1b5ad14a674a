"""Attention weights of chosen rows, all of them or the largest, or the scores at an earlier stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from service.attention.geometry import ROWS_BYTES
from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, Checkpoint, Scoring, no_checkpoint
from service.attention.rows import RowSet, score_rows
from service.attention.scores import exponentiate, grouped, normalise
from service.core.options import ScoreStage
from service.errors import invalid

Block = tuple[int, slice, torch.Tensor]  # sequence, positions among the chosen rows, values [Hq, R', its keys]


@dataclass(frozen=True, slots=True)
class WeightsView:
    """Which rows are returned, and up to which stage their scores are computed."""

    rows: tuple[int, ...] | None = None  # None: all
    stage: ScoreStage = "softmax"

    @property
    def hidden(self) -> float:
        """The value of a key that the stage hides."""
        return 0.0 if self.stage == "softmax" else -torch.inf

    def count(self, query_length: int) -> int:
        return query_length if self.rows is None else len(self.rows)

    def index(self, query: torch.Tensor) -> torch.Tensor:
        """query [B, Hq, Lq, D] -> [R] int64."""
        if self.rows is None:
            return torch.arange(query.shape[2], device=query.device)
        return torch.tensor(self.rows, dtype=torch.int64).to(query.device)


ALL_ROWS = WeightsView()


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    view: WeightsView = ALL_ROWS,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> torch.Tensor:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> [B, Hq, R, Lk] float32: softmax weights, or scores of a stage.

    Rows without keys are zeros; scores of keys that the stage hides are -inf, see `stage_scores`.

    Raises:
        FarsightError: a score that is shown overflows (422).
    """
    batch, heads, query_length, _ = query.shape
    out = torch.full((batch, heads, view.count(query_length), key.shape[2]), view.hidden, device=query.device)
    for b, part, values in _blocks(query, key, mask, view, scoring, checkpoint or no_checkpoint):
        out[b, :, part, : values.shape[-1]] = values
    return out


def top_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    view: WeightsView = ALL_ROWS,
    top_k: int = 10,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> values [B, Hq, R, k] float32 and key indices int64.

    Largest first, ranked by the values of the stage. If the stage shows fewer than `top_k` keys the index is -1 and
    the value 0.0, or -inf for scores.

    Raises:
        FarsightError: a score that is shown overflows (422).
    """
    batch, heads, query_length, _ = query.shape
    shape = batch, heads, view.count(query_length), top_k
    top = torch.full(shape, view.hidden, device=query.device)
    indices = torch.full(shape, -1, device=query.device)
    for b, part, values in _blocks(query, key, mask, view, scoring, checkpoint or no_checkpoint):
        kept = min(top_k, values.shape[-1])
        best, columns = values.topk(kept, dim=-1)
        top[b, :, part, :kept] = best
        indices[b, :, part, :kept] = columns.masked_fill(best == view.hidden, -1)
    return top, indices


def _blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    view: WeightsView,
    scoring: Scoring,
    checkpoint: Checkpoint,
) -> Iterator[Block]:
    """The values of a few rows at a time, so that one block fits the scratch memory."""
    batch, heads = query.shape[:2]
    key_length = key.shape[2]
    index = view.index(query)
    step = max(1, ROWS_BYTES // (4 * heads * key_length))
    for b in range(batch):
        for start in range(0, len(index), step):
            checkpoint()
            part = slice(start, min(start + step, len(index)))
            rows = RowSet(b, index[part].expand(heads, -1))
            if view.stage != "softmax":
                yield b, part, stage_scores(query, key, mask, rows, view.stage, scoring)
                continue
            scores = score_rows(query, key, mask, rows, slice(0, key_length), scoring)
            weights, total, _ = exponentiate(scores)
            yield b, part, normalise(weights, total)


def stage_scores(
    query: torch.Tensor, key: torch.Tensor, mask: MaskSpec, rows: RowSet, stage: ScoreStage, scoring: Scoring
) -> torch.Tensor:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> scores [Hq, R, n] float32 of rows, in nats; n: valid keys.

    raw: scale * q k^T. capped: c * tanh(raw / c). masked: capped + bias, -inf for keys that the mask hides; the other
    two hide none.

    Raises:
        FarsightError: a score that is shown overflows (422).
    """
    # not `score_rows`: its bits overflow if a bias is float32's lowest number, and nats do not
    valid = key.shape[2] if mask.kv_lengths is None else int(mask.kv_lengths.expand(query.shape[0])[rows.sequence])
    dtype = torch.promote_types(query.dtype, torch.float32)
    chosen = rows.take(query).to(dtype) * scoring.scale_for(query.shape[3])
    keys = key[rows.sequence : rows.sequence + 1, :, :valid].to(dtype)  # cut, not masked: the rest is never read
    scores = grouped(chosen[None], keys.transpose(-1, -2))[0]
    if stage != "raw" and scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if stage == "masked":
        columns = torch.arange(valid, device=query.device)
        if mask.attn_mask is not None:
            scores.add_(rows.bias(mask.attn_mask, columns))
        lo, hi = rows.limits(mask, query.shape[2], key.shape[2])
        scores.masked_fill_((columns < lo[..., None]) | (columns >= hi[..., None]), -torch.inf)
    _check_finite(scores, stage)
    return scores


def _check_finite(scores: torch.Tensor, stage: ScoreStage) -> None:
    """-inf means hidden; at a stage that hides nothing it is an overflow like any other."""
    if not scores.numel():
        return
    low, high = (float(bound) for bound in torch.aminmax(scores))
    if high != high or high == torch.inf or (low == -torch.inf and stage != "masked"):
        raise invalid(f"the {stage} scores overflow their type (query, key, scale, softcap)", code="non_finite")
