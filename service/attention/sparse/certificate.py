"""What can be proven about the keys that a sparse answer did not read, without reading them.

Every key of a block lies within the block's radius r of its centroid c, so no score s q.k is above s q.c + s |q| r.
The masses so bounded, over the mass that was read, bound the share of a row that was not. Ref: DESIGN 3; the bound says
something only where keys cluster tightly, and it is reported only there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from service.attention.geometry import SPARSE_TILE_BYTES
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring, no_checkpoint
from service.attention.scores import LOG2_E, cap, fitting
from service.attention.sparse.layout import Layout
from service.attention.sparse.moments import Moments
from service.attention.sparse.selection import Selection

FIRST_ROWS = 64  # a head's, looked at before all the others: mostly they say already that nothing can be proven
EPS, LARGEST = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).max


def unread_mass(
    query: torch.Tensor,
    selection: Selection,
    output: AttentionOutput,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> float | None:
    """query [B, Hq, Lq, D] -> the largest share of softmax mass that any row can have left unread, if it is proven.

    None: more than half, so that the bound proves nothing, or an attn_mask that differs from row to row, which
    moments do not hold.
    """
    if not selection.moments or selection.by_row or output.lse_read is None:
        return None
    bits = scoring.scale_for(query.shape[3]) * LOG2_E
    heads = list(product(range(query.shape[0]), range(query.shape[1])))
    worst = 0.0
    first = max(1, query.shape[2] // FIRST_ROWS)
    for step in (1,) if first == 1 else (first, 1):
        for b, h in heads:
            q = query[b, h, ::step].float() * bits
            read = output.lse_read[b, h, ::step] * LOG2_E
            at = torch.arange(0, query.shape[2], step, device=q.device)
            head = _UnreadBlocks(selection.layout, selection.keep[b, h], selection.moments[b][h], scoring.softcap)
            ratio = head.largest_ratio(q, at, read, checkpoint or no_checkpoint)
            if not ratio < 1:
                return None
            worst = max(worst, ratio)
    return worst / (1 + worst)


@dataclass(frozen=True, slots=True)
class _UnreadBlocks:
    """The blocks that one head did not read."""

    layout: Layout
    keep: torch.Tensor  # [nQ, nK] bool
    moments: Moments
    softcap: float | None

    def largest_ratio(self, q: torch.Tensor, at: torch.Tensor, read: torch.Tensor, pause: Checkpoint) -> float:
        """q [n, D] in bits, of rows `at` [n], log2 of their mass read [n] -> the largest unread mass over mass read.

        Infinite if a row read nothing of what it sees, or if a number overflowed on the way.
        """
        layout, moments = self.layout, self.moments
        columns = torch.arange(layout.k_blocks, device=q.device)
        length = torch.linalg.vector_norm(moments.centroid, dim=1) + moments.radius
        # float32 products of D numbers, and the two logarithms, rounded outward
        rounding = 4 * EPS * q.shape[1] ** 0.5
        worst = 0.0
        step = fitting(SPARSE_TILE_BYTES, layout.k_blocks, q.device)
        for start in range(0, len(q), step):
            pause()
            part, mass = q[start : start + step], read[start : start + step, None]
            block = at[start : start + step] // layout.rows.shape[1]
            norm = torch.linalg.vector_norm(part, dim=1)
            bound = (part @ moments.centroid.T).addr_(norm, moments.radius + rounding * length)
            bound = cap(bound, self.softcap) + moments.log_weight
            bound += 4 * EPS * (mass.abs().clamp(max=LARGEST) + bound.abs().clamp(max=LARGEST))
            unread = layout.within(block, columns, layout.full) & ~self.keep[block] & (moments.log_weight > -torch.inf)
            # a row that read nothing: its mass is -inf, and whatever is unread weighs infinitely more
            ratio = (bound - mass).exp2_().masked_fill_(~unread, 0.0).sum(1)
            worst = max(worst, float(ratio.nan_to_num(nan=torch.inf).max()))
        return worst
