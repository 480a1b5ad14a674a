"""Runs a selection: each (sequence, head, query block) gathers its key blocks and the outliers of the others."""

from __future__ import annotations

import torch

from service.attention.masks import Bounds, MaskSpec, bias_at, row_bounds
from service.attention.merge import merge
from service.attention.output import AttentionOutput, Checkpoint, no_checkpoint
from service.attention.scores import cap, default_scale, exponentiate, normalise
from service.attention.selection import Selection

SCRATCH_BYTES = 32 * 2**20


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq]."""
    batch, heads, query_length, head_dim = query.shape
    out = query.new_zeros(batch, heads, query_length, value.shape[3])
    lse = torch.full(out.shape[:3], -torch.inf, device=query.device)
    bounds = row_bounds(mask, batch, query_length, key.shape[2], device=query.device)
    row_block = torch.arange(min(selection.block_size, query_length), device=query.device)
    keep = selection.keep.flatten(0, 2)
    q_blocks = selection.keep.shape[2]
    # alike tasks together: a group is as wide as its widest
    counts, order = keep.sum(1).sort(descending=True)
    widths = (counts * selection.block_size + selection.outliers.shape[2]).tolist()
    bytes_per_column = 4 * (head_dim + value.shape[3] + 4 * len(row_block))
    start = 0
    while start < len(order) and widths[start] > 0:
        (checkpoint or no_checkpoint)()
        stop = start + max(1, SCRATCH_BYTES // (bytes_per_column * widths[start]))
        task = order[start:stop]
        b, h = task // (heads * q_blocks), task // q_blocks % heads
        rows = ((task % q_blocks)[:, None] * selection.block_size + row_block).clamp(max=query_length - 1)
        columns = _columns(selection, keep[task], b, h // (heads // key.shape[1]), key.shape[2])
        part = _run(query, key, value, mask, bounds, (b, h), rows, columns, scale, softcap, checkpoint)
        out[b[:, None], h[:, None], rows] = part[0].to(query.dtype)
        lse[b[:, None], h[:, None], rows] = part[1]
        start = stop
    return AttentionOutput(out, lse, selection.density, selection.pairs, selection.risky_rows)


def _columns(
    selection: Selection, kept: torch.Tensor, b: torch.Tensor, kv_head: torch.Tensor, key_length: int
) -> torch.Tensor:
    """kept [g, nK] -> key positions [g, C], each key once; -1: none."""
    size = selection.block_size
    chosen, blocks = kept.int().sort(dim=1, descending=True, stable=True)
    widest = int(chosen.sum(1).max())
    inside = torch.arange(size, device=kept.device)
    positions = blocks[:, :widest, None] * size + inside
    positions = positions.masked_fill((chosen[:, :widest, None] == 0) | (positions >= key_length), -1)
    outliers = selection.outliers[b, kv_head]
    already = kept.gather(1, outliers.clamp(min=0) // size)
    return torch.cat((positions.flatten(1), outliers.masked_fill(already, -1)), 1)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    bounds: Bounds,
    which: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    checkpoint: Checkpoint | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [g, n] against columns [g, C] -> out [g, n, Dv], lse [g, n] float32; wide tasks in merged parts."""
    b, h = which[0][:, None], which[1][:, None]
    kv_head = h // (query.shape[1] // key.shape[1])
    q = query[b, h, rows].float() * default_scale(scale, query.shape[3])
    lo, hi = bounds[0][b, rows][..., None], bounds[1][b, rows][..., None]
    step = max(1, SCRATCH_BYTES // (4 * len(rows) * (key.shape[3] + value.shape[3] + 4 * rows.shape[1])))
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    for part in torch.split(columns, step, dim=1):
        if result is not None and checkpoint is not None:
            checkpoint()
        at = part.clamp(min=0)
        scores = cap(torch.bmm(q, key[b, kv_head, at].float().transpose(1, 2)), softcap)
        if mask.attn_mask is not None:
            scores += bias_at(mask.attn_mask, b[..., None], h[..., None], rows[..., None], at[:, None])
        seen = part[:, None]  # -1 is below every lo
        scores.masked_fill_((seen < lo) | (seen >= hi), -torch.inf)
        weights, total, top = exponentiate(scores)
        out = normalise(torch.bmm(weights, value[b, kv_head, at].float()), total)
        lse = total.log() + top
        result = (out, lse) if result is None else merge(*result, out, lse)
    assert result is not None, "bug: a task without columns"
    return result
