"""Sparse attention that keeps its promise: predicted too dense or measured too far off, it becomes exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from service.attention import attend, sparse_settings
from service.attention.audit import Measured, measure
from service.attention.masks import MaskSpec
from service.attention.output import AttentionOutput, Checkpoint
from service.attention.pieces import Piece, join, split
from service.core import ErrorReport, Plan, PlanKind


@dataclass(frozen=True, slots=True)
class Checked:
    """An output that is within the caller's bound, what it is, and why."""

    out: torch.Tensor
    lse: torch.Tensor
    error: ErrorReport
    kind: PlanKind  # what produced `out`
    density: float | None  # of `out`, measured; sparse only
    pairs_scored: int  # everything: sparse, audit and recomputation
    reason: str  # why `kind`; empty where the plan was simply followed


def attend_checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    max_error: float,
    audit_rows: int = 59,
    seed: int = 0,
    forced: bool = False,
    max_density: float = 0.5,
    exact_kind: PlanKind = PlanKind.DENSE,
    checkpoint: Checkpoint | None = None,
) -> Checked:
    """Exact plans just run. A sparse one is selected, run, audited, and replaced where it is over `max_error`.

    Not `forced`, it goes exact before any sparse work where the selection is denser than `max_density`.
    """
    pieces = split(query, key, value, mask)

    def exact(kind: PlanKind, error: ErrorReport, before: int, reason: str) -> Checked:
        output = attend(query, key, value, kind, mask, scale=scale, softcap=softcap, checkpoint=checkpoint)
        exact_pairs = sum(piece.visible_pairs for piece in pieces)
        return Checked(output.out, output.lse, error, kind, None, before + exact_pairs, reason)

    if plan.kind is not PlanKind.SPARSE:
        return exact(plan.kind, ErrorReport(), 0, "")
    if exact_kind is PlanKind.SPARSE:
        raise ValueError("exact_kind: expected dense or chunked, got sparse")
    output = _sparse(query, value, pieces, plan, None if forced else max_density, scale, softcap, checkpoint)
    if isinstance(output, float):
        return exact(exact_kind, ErrorReport(), 0, f"predicted density {output:.2f} > {max_density:g}")

    audited = measure(
        query, key, value, output, mask,
        scale=scale, softcap=softcap, rows=audit_rows, seed=seed, checkpoint=checkpoint,
    )  # fmt: skip
    spent = (output.pairs_scored or 0) + audited.pairs
    if audited.report.relative_l2_upper > max_error:
        error, reason = _rejected(audited, max_error, output.density or 0.0)
        return exact(exact_kind, error, spent, reason)
    return Checked(output.out, output.lse, audited.report, PlanKind.SPARSE, output.density, spent, "")


def _sparse(
    query: torch.Tensor,
    value: torch.Tensor,
    pieces: list[Piece],
    plan: Plan,
    max_density: float | None,
    scale: float | None,
    softcap: float | None,
    checkpoint: Checkpoint | None,
) -> AttentionOutput | float:
    """The sparse output, or the predicted density where it is over the limit and nothing was computed."""
    from service.attention import selection, sparse

    block_size, epsilon = sparse_settings(plan)
    chosen = {
        id(piece): selection.select(piece.query, piece.key, piece.mask, block_size, epsilon, scale, softcap, checkpoint)
        for piece in pieces
        if piece.key.shape[2] > 0
    }
    density = sum(one.pairs for one in chosen.values()) / max(1, sum(one.visible for one in chosen.values()))
    if max_density is not None and density > max_density:
        return density

    def run(piece: Piece) -> AttentionOutput:
        tensors = piece.query, piece.key, piece.value, piece.mask
        return sparse.attend(*tensors, chosen[id(piece)], scale=scale, softcap=softcap, checkpoint=checkpoint)

    return join(query, value, pieces, run)


def _rejected(audited: Measured, max_error: float, density: float) -> tuple[ErrorReport, str]:
    upper = audited.report.relative_l2_upper
    reason = f"measured error {upper:.3g} > max_error {max_error:g} at density {density:.2f}: recomputed exactly"
    return replace(ErrorReport(), fallback=True, rejected_relative_l2_upper=upper), reason
