"""Raw samples of a run and the table made of them. Locust's own percentiles are rounded to two digits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

HEADER = ("endpoint", "length", "plan", "answers", "refused", "failed", "p50 ms", "p95 ms", "p99 ms", "device s")
NO_PLAN = "-"  # a request that was refused or failed


class Outcome(StrEnum):
    ANSWERED = "answered"
    REFUSED = "refused"  # 429: the service says when to come back; not a failure
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Sample:
    endpoint: str
    length: int
    outcome: Outcome
    started_s: float
    ended_s: float
    plan: str = NO_PLAN
    device_s: float = 0.0
    cost_usd: float = 0.0
    reason: str = ""

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(frozen=True, slots=True)
class Row:
    """One endpoint, length bucket and plan; percentiles of its answers only."""

    endpoint: str
    bucket: int
    plan: str
    answered: int
    refused: int
    failed: int
    p50_s: float
    p95_s: float
    p99_s: float
    device_s: float

    def cells(self) -> tuple[str, ...]:
        times = (_ms(value) for value in (self.p50_s, self.p95_s, self.p99_s))
        counts = (str(count) for count in (self.answered, self.refused, self.failed))
        return (self.endpoint, bucket_name(self.bucket), self.plan, *counts, *times, f"{self.device_s:.3f}")


def answered(endpoint: str, length: int, started_s: float, ended_s: float, headers: Mapping[str, str]) -> Sample:
    """A sample from the headers (or gRPC parameters) that every answer has; one without them is a failure."""
    try:
        return Sample(
            endpoint,
            length,
            Outcome.ANSWERED,
            started_s,
            ended_s,
            plan=headers["x-attention-plan"],
            device_s=float(headers["x-device-seconds"]),
            cost_usd=float(headers["x-cost-usd"]),
        )
    except (KeyError, ValueError) as error:
        reason = f"answer without its headers: {error!r}"
        return Sample(endpoint, length, Outcome.FAILED, started_s, ended_s, reason=reason)


class Report:
    """Collects while the run goes on. `sent` counts what began, so that what the end cut off shows."""

    def __init__(self) -> None:
        self.sent = 0
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)

    def count(self, outcome: Outcome) -> int:
        return sum(sample.outcome is outcome for sample in self.samples)

    @property
    def elapsed_s(self) -> float:
        """From the first request to the last answer."""
        if not self.samples:
            return 0.0
        return max(sample.ended_s for sample in self.samples) - min(sample.started_s for sample in self.samples)

    @property
    def exit_code(self) -> int:
        """1 where anything failed, or nothing was answered."""
        return int(self.count(Outcome.FAILED) > 0 or self.count(Outcome.ANSWERED) == 0)

    def rows(self) -> list[Row]:
        groups: dict[tuple[str, int, str], list[Sample]] = defaultdict(list)
        for sample in self.samples:
            groups[sample.endpoint, bucket_of(sample.length), sample.plan].append(sample)
        return [_row(*key, groups[key]) for key in sorted(groups)]

    def text(self) -> str:
        lines = table([HEADER, *(row.cells() for row in self.rows())])
        counts = {outcome: self.count(outcome) for outcome in Outcome}
        per_s = counts[Outcome.ANSWERED] / self.elapsed_s if self.elapsed_s else 0.0
        device_s = sum(sample.device_s for sample in self.samples)
        cost_usd = sum(sample.cost_usd for sample in self.samples)
        lines += [
            "",
            f"{counts[Outcome.ANSWERED]} answers in {self.elapsed_s:.1f} s: {per_s:.2f} requests/s; "
            f"{counts[Outcome.REFUSED]} refused, {counts[Outcome.FAILED]} failed, "
            f"{self.sent - len(self.samples)} cut off by the end of the run",
            f"device {device_s:.3f} s, cost {cost_usd:.3e} USD, as the answers say",
        ]
        reasons = Counter(sample.reason for sample in self.samples if sample.outcome is Outcome.FAILED)
        lines += [f"failed {number}x: {reason}" for reason, number in reasons.most_common(5)]
        return "\n".join(lines)


def bucket_of(length: int) -> int:
    """The power of four at or below the length."""
    assert length >= 1, "bug: a request without a length"
    return 1 << (length.bit_length() - 1) // 2 * 2


def bucket_name(bucket: int) -> str:
    return f"{bucket}-{4 * bucket - 1}"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank: a latency that was really seen; NaN of nothing."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first three left-aligned, numbers right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    head, *rest = (line(row) for row in rows)
    return [head, "-" * len(head), *rest]


def _row(endpoint: str, bucket: int, plan: str, samples: Sequence[Sample]) -> Row:
    latencies = sorted(sample.latency_s for sample in samples if sample.outcome is Outcome.ANSWERED)
    outcomes = Counter(sample.outcome for sample in samples)
    return Row(
        endpoint,
        bucket,
        plan,
        outcomes[Outcome.ANSWERED],
        outcomes[Outcome.REFUSED],
        outcomes[Outcome.FAILED],
        percentile(latencies, 50),
        percentile(latencies, 95),
        percentile(latencies, 99),
        sum(sample.device_s for sample in samples),
    )


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1000 * seconds:.2f}"
