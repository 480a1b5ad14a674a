"""A run in words and numbers: a table by endpoint, length and plan, and one summary that becomes a JSON line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loadtests.figures import (
    BUCKET_NAMES,
    BUCKETS,
    Totals,
    bucket_of,
    by_bucket,
    grouped,
    growth,
    latencies,
    percentile,
)
from loadtests.run import Run
from loadtests.samples import Outcome, Sample
from loadtests.thresholds import Check, Seconds

HEADER = ("endpoint", "tokens", "plan", "answers", "refused", "failed", "p50 ms", "p95 ms", "p99 ms", "device s")
MOST_REASONS = 5


def rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """By endpoint, length bucket and plan; percentiles are those of answers."""
    groups = grouped(samples, lambda one: (one.endpoint, BUCKET_NAMES.index(bucket_of(one.length)), one.plan))
    return [_row(endpoint, bucket, plan, group) for (endpoint, bucket, plan), group in groups.items()]


def reasons(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    """Of failures, the most frequent first."""
    return Counter(one.reason for one in samples if one.outcome is Outcome.FAILED).most_common(MOST_REASONS)


def text(run: Run, checks: Sequence[Check], slo_s: Seconds) -> str:
    """For a terminal."""
    totals, own = Totals.of(run.samples, slo_s), client(run)
    lines = _aligned([HEADER, *rows(run.samples)])
    lines += [
        "",
        f"{totals.offered} requests in {run.duration_s:g} s, {run.offered_per_s:.2f}/s: {totals.answered} answered, "
        f"{totals.good / run.duration_s:.2f}/s of them in time; {totals.refused} refused, {totals.failed} failed",
        f"device {totals.device_s:.3f} s, {totals.usd_per_1000:.3e} USD per 1,000 answers, as they say",
        f"client: {own['cores_mean']:.2f} cores, {1e3 * own['late_p99_s']:.1f} ms late (p99)",
    ]
    lines += [f"failed {count}x: {reason}" for reason, count in reasons(run.samples)]
    lines += [f"{'ok    ' if one.passed else 'MISSED'} {one}" for one in checks]
    return "\n".join(lines)


def client(run: Run) -> dict[str, float]:
    """Whether it was the client that was slow. Both shared the machine's cores."""
    cores = [one.client_cores for one in run.moments if one.at_s <= run.duration_s]
    late = [one.sent_s - one.at_s for one in run.samples]
    return {
        "cores_mean": sum(cores) / len(cores) if cores else math.nan,
        "cores_max": max(cores, default=math.nan),
        "late_p50_s": percentile(late, 50),
        "late_p99_s": percentile(late, 99),
    }


def service(run: Run) -> dict[str, float]:
    """What was seen of it; NaN where it ran elsewhere."""
    within = [one for one in run.moments if one.at_s <= run.duration_s]
    cores = [one.service_cores for one in within if not math.isnan(one.service_cores)]
    queues = [one.queue_s for one in run.moments if not math.isnan(one.queue_s)]
    resident = [one.service_bytes for one in run.moments if not math.isnan(one.service_bytes)]
    counted = [one for one in run.moments if not math.isnan(one.batches)]
    batches = counted[-1].batches - counted[0].batches if counted else 0.0
    requests = counted[-1].batched_requests - counted[0].batched_requests if counted else 0.0
    return {
        "cores_mean": sum(cores) / len(cores) if cores else math.nan,
        "queue_max_s": max(queues, default=math.nan),
        "resident_max_bytes": max(resident, default=math.nan),
        "resident_growth": growth([(one.at_s, one.service_bytes) for one in within], run.duration_s),
        "requests_per_batch": requests / batches if batches else math.nan,
    }


def summary(run: Run, checks: Sequence[Check], slo_s: Seconds) -> dict[str, Any]:
    """Everything that is kept of a run; NaN is null."""
    tenants = grouped((one for one in run.samples if one.tenant), lambda one: one.tenant)
    found: dict[str, Any] = {
        "scenario": run.options.scenario,
        "passed": all(one.passed for one in checks),
        "duration_s": run.duration_s,
        "seed": run.options.seed,
        "scale": run.options.scale,
        "offered_per_s": run.offered_per_s,
        "goodput_per_s": Totals.of(run.samples, slo_s).good / run.duration_s,
        **_totals(run.samples, slo_s),
        "by_length": {name: _totals(group, slo_s) for name, group in by_bucket(run.samples).items()},
        "by_tenant": {name: _totals(group, slo_s) for name, group in tenants.items()},
        "plans": dict(Counter(one.plan for one in run.samples if one.outcome is Outcome.ANSWERED)),
        "client": client(run),
        "service": service(run),
        "happened": run.happened,
        "reasons": reasons(run.samples),
        "checks": [{**one.model_dump(), "passed": one.passed} for one in checks],
        "slo_s": slo_s,
    }
    return {name: _finite(value) for name, value in found.items()}


def bucket_label(name: str) -> str:
    place = BUCKET_NAMES.index(name)
    if place == len(BUCKETS):
        return f"over {BUCKETS[-1]:,}"
    return f"{1 if place == 0 else BUCKETS[place - 1] + 1:,} to {BUCKETS[place]:,}"


def _totals(samples: Sequence[Sample], slo_s: Seconds) -> dict[str, Any]:
    totals = Totals.of(samples, slo_s)
    return {**asdict(totals), "usd_per_1000": totals.usd_per_1000}


def _finite(value: Any) -> Any:
    """As JSON has it: NaN is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(endpoint: str, bucket: int, plan: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    seen, outcomes = latencies(samples), Counter(one.outcome for one in samples)
    counts = (f"{outcomes[one]}" for one in Outcome)
    times = ("-" if not seen else f"{1e3 * percentile(seen, percent):.2f}" for percent in (50, 95, 99))
    device_s = sum(one.device_s for one in samples)
    return (endpoint, bucket_label(BUCKET_NAMES[bucket]), plan, *counts, *times, f"{device_s:.3f}")


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first three left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.ljust(width) if at < 3 else cell.rjust(width) for at, (cell, width) in padded).rstrip()

    head, *rest = (line(row) for row in table)
    return [head, "-" * len(head), *rest]
