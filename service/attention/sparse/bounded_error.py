"""Sparse attention that keeps its promise: predicted too dense or measured too far off, it becomes exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from service.attention import DEFAULT_EPSILON, ERROR_EXPONENT, attend, select_blocks
from service.attention.masks import MaskSpec
from service.attention.output import AttentionOutput, Checkpoint
from service.attention.segments import Segment, join, split
from service.attention.sparse.audit import Measured, measure
from service.attention.sparse.certificate import unread_mass
from service.core.answer import ErrorReport
from service.core.plan import Plan, PlanKind

Certify = Callable[[], float | None]
RETRY_WITHIN = 5.0  # times max_error: further off, a tighter epsilon would not be enough


@dataclass(frozen=True, slots=True)
class BoundedErrorOutput:
    """An output that is within the caller's bound, what it is, and why."""

    out: torch.Tensor
    lse: torch.Tensor
    error: ErrorReport
    kind: PlanKind  # what produced `out`
    density: float | None  # of `out`, measured; sparse only
    epsilon: float | None  # that `out` was selected with; sparse only
    pairs_scored: int  # everything: sparse, audit and recomputation
    reason: str  # why `kind` or `epsilon`; empty where the plan was simply followed


@dataclass(frozen=True, slots=True)
class _Setup:
    """The arguments of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskSpec
    segments: list[Segment]
    scale: float | None
    softcap: float | None
    checkpoint: Checkpoint | None

    def exact(self, kind: PlanKind, error: ErrorReport, before: int, reason: str) -> BoundedErrorOutput:
        output = attend(
            self.query, self.key, self.value, kind, self.mask,
            scale=self.scale, softcap=self.softcap, checkpoint=self.checkpoint,
        )  # fmt: skip
        pairs = before + sum(segment.visible_pairs for segment in self.segments)
        return BoundedErrorOutput(output.out, output.lse, error, kind, None, None, pairs, reason)

    def sparse(self, plan: Plan, max_density: float | None) -> tuple[AttentionOutput, Certify] | float:
        """The sparse output and what certifies it, or the predicted density where that is over the limit."""
        from service.attention.sparse import attend as sparse

        chosen = {
            id(segment): select_blocks(segment, plan, self.scale, self.softcap, self.checkpoint)
            for segment in self.segments
            if segment.key.shape[2] > 0
        }
        density = sum(one.pairs for one in chosen.values()) / max(1, sum(one.visible for one in chosen.values()))
        if max_density is not None and density > max_density:
            return density
        outputs: list[tuple[Segment, AttentionOutput]] = []
        scale, softcap, checkpoint = self.scale, self.softcap, self.checkpoint

        def run(segment: Segment) -> AttentionOutput:
            selection, tensors = chosen[id(segment)], (segment.query, segment.key, segment.value, segment.mask)
            output = sparse.attend(*tensors, selection, scale=scale, softcap=softcap, checkpoint=checkpoint)
            outputs.append((segment, output))
            return output

        def certify() -> float | None:
            worst = 0.0
            for segment, output in outputs:
                proven = unread_mass(
                    segment.query, chosen[id(segment)], output, scale=scale, softcap=softcap, checkpoint=checkpoint
                )
                if proven is None:
                    return None
                worst = max(worst, proven)
            return worst

        return join(self.query, self.value, self.segments, run), certify

    def measure(self, output: AttentionOutput, rows: int, seed: int) -> Measured:
        return measure(
            self.query, self.key, self.value, output, self.mask,
            scale=self.scale, softcap=self.softcap, rows=rows, seed=seed, checkpoint=self.checkpoint,
        )  # fmt: skip


def attend_with_error_bound(
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
    needs_lse: bool = False,
    checkpoint: Checkpoint | None = None,
) -> BoundedErrorOutput:
    """Exact plans just run. A sparse one is selected, run and audited; over `max_error` it is tried once more with a
    smaller epsilon, and then replaced by an exact one.

    Not `forced`, it goes exact before any sparse work where the selection is denser than `max_density`. `needs_lse`:
    the log-sum-exp is handed out too, and may err by `max_error` (root mean square, nats) like the output.
    """
    setup = _Setup(query, key, value, mask, split(query, key, value, mask), scale, softcap, checkpoint)
    if plan.kind is not PlanKind.SPARSE:
        return setup.exact(plan.kind, ErrorReport(), 0, "")
    if exact_kind is PlanKind.SPARSE:
        raise ValueError("exact_kind: expected dense or chunked, got sparse")
    plan = replace(plan, epsilon=DEFAULT_EPSILON if plan.epsilon is None else plan.epsilon)
    spent, history, error = 0, "", ErrorReport()
    for last in (False, True):
        assert plan.epsilon is not None, "bug: set above"
        ran = setup.sparse(plan, None if forced else max_density)
        if isinstance(ran, float):
            reason = f"{history}predicted density {ran:.2f} > {max_density:g} with epsilon {plan.epsilon:.2g}"
            return setup.exact(exact_kind, error, spent, reason)
        output, certify = ran
        audited = setup.measure(output, audit_rows, seed)
        spent += (output.pairs_scored or 0) + audited.pairs
        upper = audited.report.relative_l2_upper
        if needs_lse:
            upper = max(upper, audited.report.lse_error)
        if upper <= max_error:
            report = replace(audited.report, certified_unread=certify())
            found = output.density, plan.epsilon
            return BoundedErrorOutput(
                output.out, output.lse, report, PlanKind.SPARSE, *found, spent, history.rstrip(", ")
            )
        error = replace(ErrorReport(), fallback=True, rejected_relative_l2_upper=upper)
        history += (
            f"measured error {upper:.3g} > max_error {max_error:g} "
            f"with epsilon {plan.epsilon:.2g} at density {output.density or 0.0:.2f}, "
        )
        del output, ran, certify  # their memory is needed
        if last or upper > RETRY_WITHIN * max_error:
            break
        plan = replace(plan, epsilon=plan.epsilon * tighter(upper / max_error))
    return setup.exact(exact_kind, error, spent, f"{history}recomputed exactly")


def tighter(excess: float) -> float:
    """What epsilon is multiplied with after an error `excess` times too large: aims at half of what is allowed."""
    return min(0.25, 0.5 * float(excess ** (-1 / ERROR_EXPONENT)))
