"""Sparse attention within a caller's error: predicted too dense or measured too far off, it becomes exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from service.attention import DEFAULT_BLOCK_SIZE, DEFAULT_EPSILON, ERROR_EXPONENT
from service.attention.dispatch import attend
from service.attention.geometry import AUDIT_ROWS
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring
from service.attention.segments import Segment, join, split
from service.attention.sparse import attend as sparse
from service.attention.sparse.audit import measure
from service.attention.sparse.certificate import unread_mass
from service.attention.sparse.selection import Selection, SelectionSettings, select
from service.core.answer import ErrorReport
from service.core.plan import PlanKind

RETRY_WITHIN = 5.0  # times max_error: further off, a tighter epsilon would not be enough


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """How far a sparse output may be from the exact one, how that is measured, and what replaces it."""

    max_error: float  # relative L2 error, upper confidence limit
    exact_kind: PlanKind  # what replaces a sparse output over the bound: DENSE or CHUNKED
    epsilon: float = DEFAULT_EPSILON  # the first one tried
    block_size: int = DEFAULT_BLOCK_SIZE
    audit_rows: int = AUDIT_ROWS  # of each head
    seed: int = 0  # of the audit's draw
    max_density: float | None = 0.5  # denser selections go exact before any sparse work; None: never
    needs_lse: bool = False  # lse is returned too: its root mean square error, in nats, is held to max_error
    needs_certificate: bool = False  # prove how little was left unread

    def __post_init__(self) -> None:
        if self.exact_kind is PlanKind.SPARSE:
            raise ValueError("exact_kind: expected dense or chunked, got sparse")


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

    Sparse attention is selected, run and audited. Over `bound.max_error` it is tried once more with a smaller epsilon,
    and then replaced by exact attention.

    Raises:
        ValueError: cu_seqlens of the mask do not cover the rows and keys.
    """
    run = _BoundedRun(AttentionInputs(query, key, value, mask, scoring), split(query, key, value, mask), checkpoint)
    epsilon, pairs, history, rejected = bound.epsilon, 0, "", ErrorReport()
    for is_retry in (False, True):
        attempt = run.attempt(epsilon, bound)
        if isinstance(attempt, float):
            reason = f"predicted density {attempt:.2f} > {bound.max_density:g} with epsilon {epsilon:.2g}"
            return run.exact(bound.exact_kind, rejected, pairs, history + reason)
        pairs += attempt.pairs
        if attempt.upper <= bound.max_error:
            return BoundedErrorOutput(
                attempt.output.out, attempt.output.lse, attempt.error, PlanKind.SPARSE,
                attempt.output.density, epsilon, pairs, history.rstrip(", "),
            )  # fmt: skip
        upper = attempt.upper
        rejected = ErrorReport(fallback=True, rejected_relative_l2_upper=upper)
        history += (
            f"measured error {upper:.3g} > max_error {bound.max_error:g} "
            f"with epsilon {epsilon:.2g} at density {attempt.output.density or 0.0:.2f}, "
        )
        del attempt  # its memory is needed
        if is_retry or upper > RETRY_WITHIN * bound.max_error:
            break
        epsilon *= tighter(upper / bound.max_error)
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


@dataclass(frozen=True, slots=True)
class _BoundedRun:
    """The inputs of one call, whole and as segments."""

    inputs: AttentionInputs
    segments: Sequence[Segment]
    checkpoint: Checkpoint | None

    def exact(self, kind: PlanKind, error: ErrorReport, pairs: int, reason: str) -> BoundedErrorOutput:
        """Exact attention, after sparse attempts that scored `pairs`."""
        tensors, mask = self.inputs.tensors, self.inputs.mask
        output = attend(*tensors, kind, mask, scoring=self.inputs.scoring, checkpoint=self.checkpoint)
        pairs += sum(segment.visible_pairs for segment in self.segments)
        return BoundedErrorOutput(output.out, output.lse, error, kind, None, None, pairs, reason)

    def attempt(self, epsilon: float, bound: ErrorBound) -> _SparseAttempt | float:
        """A sparse output and its audit, or the predicted density if it is over the limit."""
        settings = SelectionSettings(bound.block_size, epsilon)
        selections = {id(segment): self._select(segment, settings) for segment in self.segments if segment.has_keys}
        visible = sum(selection.visible for selection in selections.values())
        density = sum(selection.pairs for selection in selections.values()) / max(1, visible)
        if bound.max_density is not None and density > bound.max_density:
            return density
        parts: list[tuple[Segment, Selection, AttentionOutput]] = []

        def run(segment: Segment) -> AttentionOutput:
            selection = selections[id(segment)]
            output = self._attend(segment, selection)
            if bound.needs_certificate:  # else its memory is needed
                parts.append((segment, selection, output))
            return output

        output = join(self.inputs.query, self.inputs.value, self.segments, run)
        audited = measure(self.inputs, output, rows=bound.audit_rows, seed=bound.seed, checkpoint=self.checkpoint)
        error = audited.report
        upper = max(error.relative_l2_upper, error.lse_error) if bound.needs_lse else error.relative_l2_upper
        if bound.needs_certificate and upper <= bound.max_error:
            error = replace(error, certified_unread=self._certify(parts))
        return _SparseAttempt(output, error, upper, (output.pairs_scored or 0) + audited.pairs)

    def _select(self, segment: Segment, settings: SelectionSettings) -> Selection:
        scoring, checkpoint = self.inputs.scoring, self.checkpoint
        return select(*segment.tensors, segment.mask, settings, scoring=scoring, checkpoint=checkpoint)

    def _attend(self, segment: Segment, selection: Selection) -> AttentionOutput:
        scoring, checkpoint = self.inputs.scoring, self.checkpoint
        return sparse.attend(*segment.tensors, segment.mask, selection, scoring=scoring, checkpoint=checkpoint)

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
