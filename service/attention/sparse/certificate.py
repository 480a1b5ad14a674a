"""What can be proven about the keys that a sparse answer did not read, without reading them.

Every key of a block lies within the block's radius r of its centroid c, so no score s q.k is above s q.c + s |q| r.
The masses so bounded, over the mass that was read, bound the share of a row that was not. Ref: DESIGN 3; the bound says
something only where keys cluster tightly, and it is told only there.
"""

from __future__ import annotations

import torch

from service.attention.output import AttentionOutput, Checkpoint, no_checkpoint
from service.attention.scores import LOG2_E, cap, default_scale, fitting
from service.attention.sparse.layout import Layout
from service.attention.sparse.moments import Moments
from service.attention.sparse.selection import Selection

FIRST_ROWS = 64  # a head's, looked at before all the others: mostly they say already that nothing can be proven
TILE_BYTES = 4 * 2**20
EPS, LARGEST = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).max


def unread_mass(
    query: torch.Tensor,
    selection: Selection,
    output: AttentionOutput,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> float | None:
    """query [B, Hq, Lq, D] -> the largest share of softmax mass that any row can have left unread, if that is proven.

    None: more than half, so that the bound proves nothing, or a mask of every row's own, which moments do not hold.
    """
    if not selection.moments or selection.by_row or output.lse_read is None:
        return None
    pause = checkpoint or no_checkpoint
    bits = default_scale(scale, query.shape[3]) * LOG2_E
    heads = [(b, h) for b in range(query.shape[0]) for h in range(query.shape[1])]
    worst = 0.0
    first = max(1, query.shape[2] // FIRST_ROWS)
    for step in (1,) if first == 1 else (first, 1):
        for b, h in heads:
            q = query[b, h, ::step].float() * bits
            read = output.lse_read[b, h, ::step] * LOG2_E
            at = torch.arange(0, query.shape[2], step, device=q.device)
            head = selection.layout, selection.keep[b, h], selection.moments[b][h]
            ratio = _head(q, at, read, *head, softcap, pause)
            if not ratio < 1:
                return None
            worst = max(worst, ratio)
    return worst / (1 + worst)


def _head(
    q: torch.Tensor,
    at: torch.Tensor,
    read: torch.Tensor,
    layout: Layout,
    keep: torch.Tensor,
    moments: Moments,
    softcap: float | None,
    pause: Checkpoint,
) -> float:
    """q [n, D] in bits, of rows `at` [n], log2 of their mass read [n] -> the largest unread mass over the mass read.

    Infinite where a row read nothing of what it sees, or where a number was lost on the way.
    """
    place = torch.arange(layout.k_blocks, device=q.device)
    length = torch.linalg.vector_norm(moments.centroid, dim=1) + moments.radius
    # float32 products of D numbers, and the two logarithms, rounded outward
    rounding = 4 * EPS * q.shape[1] ** 0.5
    worst = 0.0
    step = fitting(TILE_BYTES, layout.k_blocks, q.device)
    for start in range(0, len(q), step):
        pause()
        part, told = q[start : start + step], read[start : start + step, None]
        block = at[start : start + step] // layout.rows.shape[1]
        norm = torch.linalg.vector_norm(part, dim=1)
        bound = (part @ moments.centroid.T).addr_(norm, moments.radius + rounding * length)
        bound = cap(bound, softcap) + moments.log_weight
        bound += 4 * EPS * (told.abs().clamp(max=LARGEST) + bound.abs().clamp(max=LARGEST))
        unread = layout.within(block, place, layout.full) & ~keep[block] & (moments.log_weight > -torch.inf)
        # a row without anything read: told is -inf, and whatever is unread weighs infinitely more
        ratio = (bound - told).exp2_().masked_fill_(~unread, 0.0).sum(1)
        worst = max(worst, float(ratio.nan_to_num(nan=torch.inf).max()))
    return worst
