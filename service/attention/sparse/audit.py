"""Measures how far an output is from the exact one, on rows that the selection did not know would be asked for.

The upper limit. Rows are drawn uniformly per head; R = sum e / sum o is a ratio estimate and its linearised variance
with a Student quantile gives the usual limit (97.5 %: a rejected answer may be tried once more). That limit alone is
too low where errors are heavy-tailed: a few bad rows that were not drawn leave no trace in the variance. So a second
term pays for what was not seen: with 97.5 % confidence at most 1 - 0.025^(1/n) of the rows err more than the largest
error drawn, and each of them is charged the largest error known at all, that of the rows that read the least
included. That charge is a rule of thumb, not a theorem; how often the limit covers is measured
(tests/attention/test_audit.py).

Rounding. What is measured is compared with float32, which large scores make wrong in the same way on both sides. A
score is off by some `eps * |q| |k|`, and with it, as a share, each weight: if that is little, it is added to the limit.
If it is more, the rows with the largest scores of those that were drawn are computed in float64, too, and twice the
larger of the errors of their output and log-sum-exp is added. That is a sample, not a bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import NormalDist
from typing import NamedTuple

import torch

from service.attention.geometry import AUDIT_ROWS, ROUNDING_ROWS
from service.attention.inputs import AttentionInputs
from service.attention.merge import Partial
from service.attention.output import AttentionOutput, Checkpoint
from service.attention.rows import RowSet, attend_rows
from service.core.answer import ErrorReport

EPS = torch.finfo(torch.float32).eps
NEGLIGIBLE = 1e-4  # absolute error of scores
CONFIDENCE = 0.975  # of one look: a rejected answer is tried once more, and both together must keep 95 %
MANY_ROWS = 459  # a head's: 99 % of the rows at 99 % confidence (1 - 0.99^459); fewer: 95 % (1 - 0.95^59 = 0.95)


@dataclass(frozen=True, slots=True)
class Measured:
    """The report and the query-key pairs that were scored to write it."""

    report: ErrorReport
    pairs: int
    head_errors: tuple[float, ...]  # of each query head: its part of the squared error; they add up to relative_l2^2


class Sample(NamedTuple):
    """What was measured of rows; all [Hq, R] or [n], float64."""

    error: torch.Tensor  # squared
    norm: torch.Tensor  # squared, of the exact output
    recall: torch.Tensor  # share of softmax mass that was read
    lse: torch.Tensor  # absolute error of the log-sum-exp

    @property
    def relative(self) -> torch.Tensor:
        """Relative error of each row; a row that should be zero and is not counts as wholly wrong."""
        zero = self.norm == 0
        ratio = (self.error / self.norm.masked_fill(zero, 1.0)).sqrt()
        return torch.where(zero, (self.error > 0).double(), ratio)


def measure(
    inputs: AttentionInputs,
    output: AttentionOutput,
    *,
    rows: int = AUDIT_ROWS,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Measured:
    """Compare `output` with exact attention of `rows` rows of each head, drawn uniformly from `seed`.

    Args:
        inputs: what `output` was computed from.
        output: out [B, Hq, Lq, Dv], lse [B, Hq, Lq]; its risky rows are audited as well.
        rows: number of rows of each head, at least 2.
        seed: of the draw; callers choose it after selection, so that selection cannot know the rows.
        checkpoint: called between blocks of keys; may raise to stop the work.

    Returns:
        The report, and the pairs that were scored to write it.
    """
    batch, heads, query_length, _ = inputs.query.shape
    count = min(max(rows, 2), query_length)
    draw = torch.Generator().manual_seed(seed)
    drawn_samples: list[Sample] = []
    risky_samples: list[Sample] = []
    rounding = lse_rounding = 0.0
    pairs = 0
    for b in range(batch):
        drawn = torch.stack([torch.randperm(query_length, generator=draw)[:count] for _ in range(heads)])
        chosen = RowSet(b, torch.cat((drawn, _risky(output, b, heads)), 1).to(inputs.query.device))
        exact, lse = attend_rows(inputs, chosen, checkpoint=checkpoint)
        rounded = _rounding(inputs, chosen, (exact, lse), checkpoint)
        rounding, lse_rounding = max(rounding, rounded[0]), max(lse_rounding, rounded[1])
        pairs += rounded[2]
        sample = _compare(output, chosen, exact, lse)
        drawn_samples.append(Sample(*(field[:, :count] for field in sample)))
        risky_samples.append(Sample(*(field[:, count:] for field in sample)))
        lo, hi = chosen.limits(inputs.mask, query_length, inputs.key.shape[2])
        pairs += int((hi - lo).sum())
    report = _report(_join(drawn_samples), _join(risky_samples), count, query_length)
    report = replace(
        report,
        relative_l2_upper=_finite(report.relative_l2_upper + max(rounding, lse_rounding)),
        row_bound=_finite(report.row_bound + max(rounding, lse_rounding)),
        lse_error=_finite(report.lse_error + lse_rounding),
    )
    if not all(isfinite(bound) for bound in torch.aminmax(output.out)):  # in a row that was not drawn
        report = replace(report, relative_l2_upper=sys.float_info.max)
    return Measured(report, pairs, _by_head(drawn_samples))


def _by_head(samples: Sequence[Sample]) -> tuple[float, ...]:
    """samples [Hq, R] of each sequence -> the part of each head in the squared relative error of all."""
    errors = torch.stack([sample.error for sample in samples]).sum((0, 2)).tolist()
    total = sum(float(sample.norm.sum()) for sample in samples)
    return tuple(_finite(error / total) if total else 0.0 for error in errors)


def _rounding(
    inputs: AttentionInputs, rows: RowSet, exact: Partial, checkpoint: Checkpoint | None
) -> tuple[float, float, int]:
    """exact: out [Hq, R, Dv], lse [Hq, R] of rows in float32 -> (relative error of outputs, absolute error of lse,
    pairs that were scored for it), see the file's head."""
    if bool((exact[1] == -torch.inf).all()):  # no row sees a key
        return 0.0, 0.0, 0
    query, key = inputs.query[rows.sequence].float(), inputs.key[rows.sequence].float()
    largest = float(query.norm(dim=-1).max()) * float(key.norm(dim=-1).max())
    expected = EPS * largest * inputs.scoring.scale_for(query.shape[2])
    if expected <= NEGLIGIBLE:
        return expected, expected, 0
    some = min(ROUNDING_ROWS, rows.index.shape[1])
    chosen = exact[1].masked_fill(exact[1] == -torch.inf, 0.0).abs().topk(some, dim=1).indices
    few = RowSet(rows.sequence, rows.index.gather(1, chosen))
    out, lse = attend_rows(inputs, few, checkpoint=checkpoint, dtype=torch.float64)
    float32 = exact[0].gather(1, chosen[..., None].expand(-1, -1, out.shape[2])), exact[1].gather(1, chosen)
    error = Sample((float32[0].double() - out).square().sum(-1), out.square().sum(-1), lse, lse).relative
    difference = torch.where(lse == -torch.inf, 0.0, (float32[1].double() - lse).abs())
    lo, hi = few.limits(inputs.mask, inputs.query.shape[2], inputs.key.shape[2])
    return 2 * float(error.max()), 2 * float(difference.max()), int((hi - lo).sum())


def _risky(output: AttentionOutput, b: int, heads: int) -> torch.Tensor:
    """[Hq, n] rows of sequence b that the selector rates riskiest; heads with fewer repeat theirs."""
    if output.risky_rows is None:
        return torch.zeros(heads, 0, dtype=torch.int64)
    table = output.risky_rows.cpu()
    found = [table[(table[:, 0] == b) & (table[:, 1] == h), 2] for h in range(heads)]
    most = max(len(rows) for rows in found)
    if most == 0 or min(len(rows) for rows in found) == 0:
        return torch.zeros(heads, 0, dtype=torch.int64)
    return torch.stack([rows[torch.arange(most) % len(rows)] for rows in found])


def _compare(output: AttentionOutput, rows: RowSet, exact: torch.Tensor, lse: torch.Tensor) -> Sample:
    """exact [Hq, R, Dv], lse [Hq, R] of rows, against those of the output -> a sample [Hq, R]."""
    measured = rows.take(output.out).double()
    read = output.lse if output.lse_read is None else output.lse_read
    kept = read[rows.sequence].gather(1, rows.index).double()
    full = lse.double().masked_fill(lse == -torch.inf, 0.0)
    recall = torch.where(lse == -torch.inf, 1.0, torch.exp(kept - full)).clamp(max=1.0)
    measured_lse = output.lse[rows.sequence].gather(1, rows.index).double()
    return Sample(
        error=(measured - exact.double()).square().sum(-1),
        norm=exact.double().square().sum(-1),
        recall=recall,
        lse=torch.where(measured_lse == lse, 0.0, (measured_lse - lse).abs()),  # -inf - -inf is NaN
    )


def _join(parts: list[Sample]) -> Sample:
    """[Hq, R] each -> [n]."""
    return Sample(*(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*parts, strict=True)))


def _report(sample: Sample, risky: Sample, drawn: int, query_length: int) -> ErrorReport:
    everything = drawn == query_length
    n = len(sample.error)
    coverage = 0.99 if drawn >= MANY_ROWS else 0.95
    worst = float(risky.relative.max()) if len(risky.error) else 0.0
    largest = float(torch.cat((sample.error, risky.error)).max())  # NaN where any is: max() of Python would lose it
    ratio, upper = ratio_limits(sample.error, sample.norm, largest, drawn / query_length)
    return ErrorReport(
        kind="measured",
        relative_l2=_finite(ratio),
        relative_l2_upper=_finite(upper),
        row_bound=_finite(float(sample.relative.max())),
        rows=n,
        coverage=1.0 if everything else coverage,
        confidence=1.0 if everything else 1.0 - coverage**n,
        riskiest_row=_finite(worst),
        recall=float(sample.recall.nan_to_num(0.0).mean()),
        lse_error=_finite(float(sample.lse.square().mean().sqrt())),
    )


def ratio_limits(error: torch.Tensor, norm: torch.Tensor, largest: float, fraction: float) -> tuple[float, float]:
    """error, norm [n] -> sqrt(sum e / sum o) and its one-sided upper limit; `fraction` of all rows were drawn.

    Ref: Cochran, Sampling Techniques, 6.4 (variance of a ratio) and the rule of three (see the file's head).
    """
    n, total = len(error), float(norm.sum())
    if total == 0:
        wrong = float(float(error.sum()) > 0)
        return wrong, wrong
    ratio = float(error.sum()) / total
    unseen = 1.0 - fraction
    if unseen <= 0:
        return ratio**0.5, ratio**0.5
    residual = error - ratio * norm
    deviation = float((residual.square().sum() / (n - 1)).sqrt())
    sampled = student(CONFIDENCE, n - 1) * deviation * (n * unseen) ** 0.5 / total
    hidden = unseen * (1.0 - (1.0 - CONFIDENCE) ** (1.0 / n)) * largest * n / total
    return ratio**0.5, (ratio + sampled + hidden) ** 0.5


def student(confidence: float, freedom: int) -> float:
    """One-sided quantile of Student's t. Ref: Cornish-Fisher, Abramowitz and Stegun 26.7.5; within 1 % from 5 on."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _finite(x: float) -> float:
    """JSON has no infinity, and NaN compares as harmless: both become the largest number there is."""
    return x if isfinite(x) else sys.float_info.max
