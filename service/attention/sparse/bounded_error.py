"""Sparse attention within a caller's error: predicted too dense or measured too far off, it becomes exact.

Heads differ widely, so each is decided by itself: a head that would read too much is computed exactly from the start,
and a head that is measured too far off is replaced by exact attention. Only if that is not enough, or most heads are
such, the whole call is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Self

import torch

from service.attention import DEFAULT_BLOCK_SIZE, DEFAULT_EPSILON, ERROR_EXPONENT, scaled_epsilon
from service.attention.block_map import BlockMap
from service.attention.dispatch import attend
from service.attention.geometry import AUDIT_ROWS
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring
from service.attention.segments import Segment, join, split
from service.attention.sparse.audit import measure
from service.attention.sparse.certificate import unread_mass
from service.attention.sparse.segment_plan import SegmentPlan, SegmentPlanner, part_of
from service.attention.sparse.selection import Selection, SelectionSettings
from service.core.answer import ErrorReport
from service.core.plan import PlanKind

REPAIRED = 0.5  # of max_error: what is aimed at by replacing heads
NEXT_AIM = 0.7  # of what would have been within the bound
RETRY_WITHIN = 5.0  # times max_error: further off, a tighter epsilon would not be enough


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """How far a sparse output may be from the exact one, how that is measured, and what replaces it."""

    max_error: float  # relative L2 error, upper confidence limit
    exact_kind: PlanKind  # what replaces a sparse output over the bound: DENSE or CHUNKED
    epsilon: float = DEFAULT_EPSILON  # the first one tried
    aim: float | None = None  # what leaves are chosen for; None: a part of max_error, so that its audit passes
    block_size: int = DEFAULT_BLOCK_SIZE
    audit_rows: int = AUDIT_ROWS  # of each head
    seed: int = 0  # of the audit's draw
    max_density: float | None = 0.5  # denser heads, or all, go exact before any sparse work; None: never
    needs_lse: bool = False  # lse is returned too: its root mean square error, in nats, is held to max_error
    needs_certificate: bool = False  # prove how little was left unread
    map_tiles: int = 0  # a side at most, of a map of where it read; 0: none. Not of packed sequences

    def __post_init__(self) -> None:
        if self.exact_kind is PlanKind.SPARSE:
            raise ValueError("exact_kind: expected dense or chunked, got sparse")

    def for_error(self, aim: float, max_error: float) -> Self:
        """The same for another error that is aimed at, and another that is allowed; epsilon changes with the first."""
        return replace(self, aim=aim, max_error=max_error, epsilon=scaled_epsilon(self.epsilon, aim / self.max_error))


@dataclass(frozen=True, slots=True)
class BoundedErrorOutput:
    """An output that is within the caller's bound, what it is, and why."""

    out: torch.Tensor  # [B, Hq, Lq, Dv]
    lse: torch.Tensor  # [B, Hq, Lq]
    error: ErrorReport
    kind: PlanKind  # what produced `out`
    density: float | None  # of `out`, measured; sparse only
    epsilon: float | None  # that `out` was selected with; sparse only
    pairs_scored: int  # everything: sparse, audit and recomputation
    reason: str  # why `kind` or `epsilon`; empty if the first sparse attempt was within the bound
    block_map: BlockMap | None = None


def attend_with_error_bound(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    bound: ErrorBound,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> BoundedErrorOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv] within `bound`.

    Sparse attention is selected, run and audited. Over `bound.max_error`, the heads that are too far off are replaced
    by exact attention and all is audited again; or if these are most heads, all are tried once more with a smaller
    epsilon (by leaves: for a smaller error). What is over the bound then is replaced altogether.

    Raises:
        ValueError: cu_seqlens of the mask do not cover the rows and keys.
    """
    inputs, segments = AttentionInputs(query, key, value, mask, scoring), split(query, key, value, mask)
    drawn = BlockMap.of(query, key, mask, bound.map_tiles) if bound.map_tiles else None
    run = _BoundedRun(inputs, segments, checkpoint, SegmentPlanner(checkpoint), drawn)
    epsilon, pairs, history, rejected = bound.epsilon, 0, "", ErrorReport()
    for is_retry in (False, True):
        attempt = run.attempt(epsilon, bound)
        if isinstance(attempt, str):
            return run.exact(bound.exact_kind, rejected, pairs, history + attempt)
        pairs += attempt.pairs
        # no more than two looks: each may be lucky
        repaired = run.repaired(attempt, bound) if attempt.upper > bound.max_error and not is_retry else None
        if repaired is not None:
            pairs += repaired.pairs
            attempt = repaired
        if attempt.upper <= bound.max_error:
            return BoundedErrorOutput(
                attempt.output.out, attempt.output.lse, attempt.error, PlanKind.SPARSE,
                attempt.output.density, epsilon, pairs, (history + attempt.reason).removesuffix(", "), drawn,
            )  # fmt: skip
        upper = attempt.upper
        rejected = ErrorReport(fallback=True, rejected_relative_l2_upper=upper)
        history += (
            f"measured error {upper:.3g} > max_error {bound.max_error:g} "
            f"with epsilon {epsilon:.2g} at density {attempt.output.density or 0.0:.2f}, "
        )
        is_last = is_retry or repaired is not None or upper > RETRY_WITHIN * bound.max_error
        del attempt, repaired  # their memory is needed
        if is_last:
            break
        epsilon *= run.tighter(upper / bound.max_error)
    return run.exact(bound.exact_kind, rejected, pairs, f"{history}recomputed exactly")


def tighter(excess: float) -> float:
    """The factor on epsilon after an error `excess` times too large: aims at half of what is allowed."""
    return min(0.25, 0.5 * float(excess ** (-1 / ERROR_EXPONENT)))


@dataclass(frozen=True, slots=True)
class _SparseAttempt:
    """One sparse output and what its audit measured."""

    output: AttentionOutput
    error: ErrorReport
    upper: float  # what is compared with max_error
    pairs: int  # of the output and of its audit
    head_errors: tuple[float, ...]  # of each query head: its part of the squared error
    exact: frozenset[int] = frozenset()  # heads that are exact in some sequence
    reason: str = ""  # which heads were computed exactly, and why


@dataclass(frozen=True, slots=True)
class _BoundedRun:
    """The inputs of one call, whole and as segments."""

    inputs: AttentionInputs
    segments: Sequence[Segment]
    checkpoint: Checkpoint | None
    planner: SegmentPlanner
    drawn: BlockMap | None

    def tighter(self, excess: float) -> float:
        """The factor on epsilon after an error so many times too large."""
        return NEXT_AIM / excess if self.planner.prepared else tighter(excess)

    def exact(self, kind: PlanKind, error: ErrorReport, pairs: int, reason: str) -> BoundedErrorOutput:
        """Exact attention, after sparse attempts that scored `pairs`."""
        self.planner.prepared.clear()  # its memory is needed
        output = self._exact(self.inputs, kind)
        pairs += sum(segment.visible_pairs for segment in self.segments)
        self._draw(range(self.inputs.query.shape[1]))
        return BoundedErrorOutput(output.out, output.lse, error, kind, None, None, pairs, reason, self.drawn)

    def _draw(self, heads: Iterable[int], batch: slice = slice(None)) -> None:
        """These heads are computed exactly."""
        if self.drawn is not None:
            self.drawn.of_batch(batch).fill(heads)

    def attempt(self, epsilon: float, bound: ErrorBound) -> _SparseAttempt | str:
        """A sparse output and its audit, or why it would not pay."""
        planned = {id(segment): self._plan(segment, epsilon, bound) for segment in self.segments if segment.has_keys}
        visible = sum(plan.visible for plan in planned.values())
        density = sum(plan.pairs for plan in planned.values()) / max(1, visible)
        pays = any(plan.pays for plan in planned.values())
        is_too_dense = bound.max_density is not None and density > bound.max_density and not pays
        if is_too_dense or (planned and not any(plan.run for plan in planned.values())):
            return f"predicted density {density:.2f} > {bound.max_density:g} with epsilon {epsilon:.2g}"
        parts: list[tuple[Segment, Selection, AttentionOutput]] = []

        if self.drawn is not None:
            self.drawn.clear()

        def run(segment: Segment) -> AttentionOutput:
            plan = planned[id(segment)]
            inputs = self._inputs(segment)
            if plan.run is None:
                self._draw(range(segment.query.shape[1]), segment.batch)
                return replace(self._exact(inputs, bound.exact_kind), pairs_scored=plan.visible)
            output = plan.run(self.drawn and self.drawn.of_batch(segment.batch))
            for b in sorted({sequence for sequence, _ in plan.exact}):
                heads = sorted(head for sequence, head in plan.exact if sequence == b)
                pairs = _fill(output, inputs, slice(b, b + 1), heads, bound.exact_kind, self.checkpoint)
                self._draw(heads, slice(segment.batch.start + b, segment.batch.start + b + 1))
                if plan.selection is None:  # else counted as what it reads
                    output = replace(output, pairs_scored=(output.pairs_scored or 0) + pairs)
            if bound.needs_certificate and plan.selection is not None:  # else its memory is needed
                parts.append((segment, plan.selection, output))
            return output

        output = join(self.inputs.query, self.inputs.value, self.segments, run)
        attempt = self._audited(output, bound, bound.seed)
        if bound.needs_certificate and attempt.upper <= bound.max_error:
            attempt = replace(attempt, error=replace(attempt.error, certified_unread=self._certify(parts)))
        exact = frozenset(head for plan in planned.values() for _, head in plan.exact)
        reasons = sorted({plan.reason for plan in planned.values() if plan.exact})
        reason = f"{_heads(exact)} exact: {', '.join(reasons)}" if exact else ""
        return replace(attempt, exact=exact, reason=reason)

    def _plan(self, segment: Segment, epsilon: float, bound: ErrorBound) -> SegmentPlan:
        inputs, settings = self._inputs(segment), SelectionSettings(bound.block_size, epsilon, bound.max_density)
        if bound.needs_certificate:  # that is about blocks
            return self.planner.by_blocks(inputs, settings)
        aim = part_of(bound.max_error, segment) if bound.aim is None else bound.aim
        return self.planner.plan(segment, inputs, settings, aim * epsilon / bound.epsilon)

    def _exact(self, inputs: AttentionInputs, kind: PlanKind) -> AttentionOutput:
        scoring, checkpoint = inputs.scoring, self.checkpoint
        return attend(*inputs.tensors, kind, inputs.mask, scoring=scoring, checkpoint=checkpoint)

    def _inputs(self, segment: Segment) -> AttentionInputs:
        return AttentionInputs(*segment.tensors, segment.mask, self.inputs.scoring)

    def repaired(self, attempt: _SparseAttempt, bound: ErrorBound) -> _SparseAttempt | None:
        """`attempt` with its worst heads replaced by exact attention and audited anew, on other rows: heads were chosen
        by the first ones. None if these are most heads, or a certificate is asked for."""
        heads = len(attempt.head_errors)
        worst, left = [], sum(attempt.head_errors)
        for head in sorted(set(range(heads)) - attempt.exact, key=lambda head: -attempt.head_errors[head]):
            if left <= (REPAIRED * bound.max_error) ** 2:
                break
            worst.append(head)
            left -= attempt.head_errors[head]
        is_most = 2 * (len(worst) + len(attempt.exact)) > heads
        if is_most or not worst or bound.needs_certificate or bound.max_density is None:
            return None
        batch = slice(0, self.inputs.query.shape[0])
        pairs = _fill(attempt.output, self.inputs, batch, worst, bound.exact_kind, self.checkpoint)
        self._draw(worst)
        density = min(1.0, (attempt.output.density or 0.0) + len(worst) / heads)
        again = self._audited(replace(attempt.output, density=density, pairs_scored=pairs), bound, bound.seed + 1)
        reason = f"{_heads(worst)} exact: measured error {attempt.upper:.3g} > max_error {bound.max_error:g}"
        return replace(again, reason="; ".join(filter(None, (attempt.reason, reason))))

    def _audited(self, output: AttentionOutput, bound: ErrorBound, seed: int) -> _SparseAttempt:
        rows = bound.audit_rows
        if self.planner.prepared:  # few rows that are far off would hide from few that are drawn
            rows = max(rows, isqrt(2 * self.inputs.query.shape[2]))
        audited = measure(self.inputs, output, rows=rows, seed=seed, checkpoint=self.checkpoint)
        error = audited.report
        upper = max(error.relative_l2_upper, error.lse_error) if bound.needs_lse else error.relative_l2_upper
        return _SparseAttempt(output, error, upper, (output.pairs_scored or 0) + audited.pairs, audited.head_errors)

    def _certify(self, parts: Sequence[tuple[Segment, Selection, AttentionOutput]]) -> float | None:
        """The largest share of mass that any row of any segment can have left unread; None if it is not proven."""
        worst = 0.0
        for segment, selection, output in parts:
            scoring, checkpoint = self.inputs.scoring, self.checkpoint
            proven = unread_mass(segment.query, selection, output, scoring=scoring, checkpoint=checkpoint)
            if proven is None:
                return None
            worst = max(worst, proven)
        return worst


def _fill(
    output: AttentionOutput,
    inputs: AttentionInputs,
    batch: slice,
    heads: Sequence[int],
    kind: PlanKind,
    checkpoint: Checkpoint | None,
) -> int:
    """Replace heads of `output` by exact ones, in place. Returns the pairs that were scored."""
    some = inputs.of_heads(batch, heads)
    exact = attend(*some.tensors, kind, some.mask, scoring=some.scoring, checkpoint=checkpoint)
    index = torch.tensor(heads, device=output.out.device)
    output.out[batch].index_copy_(1, index, exact.out)
    for lse in (output.lse, output.lse_read):
        if lse is not None:
            lse[batch].index_copy_(1, index, exact.lse.to(lse.dtype))
    return sum(segment.visible_pairs for segment in split(*some.tensors, some.mask))


def _heads(heads: Iterable[int]) -> str:
    """ "head 3", or "heads 1, 3"."""
    found = sorted(heads)
    return f"head{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
