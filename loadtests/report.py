"""Reports of a run: a table by endpoint, length and plan, and a summary that becomes a JSON line."""

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
MAX_REASONS = 5


def rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Table rows by endpoint, length bucket and plan; percentiles are over answers."""
    groups = grouped(
        samples, lambda sample: (sample.endpoint, BUCKET_NAMES.index(bucket_of(sample.length)), sample.plan)
    )
    return [_row(endpoint, bucket, plan, group) for (endpoint, bucket, plan), group in groups.items()]


def reasons(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    """(reason, count) of failures, the most frequent first."""
    return Counter(sample.reason for sample in samples if sample.outcome is Outcome.FAILED).most_common(MAX_REASONS)


def text(run: Run, checks: Sequence[Check], slo_s: Seconds) -> str:
    """Report for a terminal."""
    totals, client_load = Totals.of(run.samples, slo_s), client(run)
    lines = _aligned([HEADER, *rows(run.samples)])
    lines += [
        "",
        f"{totals.offered} requests in {run.duration_s:g} s, {run.offered_per_s:.2f}/s: {totals.answered} answered, "
        f"{totals.good / run.duration_s:.2f}/s of them in time; {totals.refused} refused, {totals.failed} failed",
        f"device {totals.device_s:.3f} s, {totals.usd_per_1000:.3e} USD per 1,000 answers, as reported by them",
        f"client: {client_load['cores_mean']:.2f} cores, {1e3 * client_load['late_p99_s']:.1f} ms late (p99)",
    ]
    lines += [f"failed {count}x: {reason}" for reason, count in reasons(run.samples)]
    lines += [f"{'ok    ' if check.passed else 'MISSED'} {check}" for check in checks]
    return "\n".join(lines)


def client(run: Run) -> dict[str, float]:
    """Load of the client, which shows whether it was the bottleneck. Client and service share the machine's cores."""
    cores = [moment.client_cores for moment in run.moments if moment.at_s <= run.duration_s]
    late = [sample.sent_s - sample.at_s for sample in run.samples]
    return {
        "cores_mean": sum(cores) / len(cores) if cores else math.nan,
        "cores_max": max(cores, default=math.nan),
        "late_p50_s": percentile(late, 50),
        "late_p99_s": percentile(late, 99),
    }


def service(run: Run) -> dict[str, float]:
    """Load of the service; NaN if it ran on another machine."""
    within = [moment for moment in run.moments if moment.at_s <= run.duration_s]
    cores = [moment.service_cores for moment in within if not math.isnan(moment.service_cores)]
    queues = [moment.queue_s for moment in run.moments if not math.isnan(moment.queue_s)]
    resident = [moment.service_bytes for moment in run.moments if not math.isnan(moment.service_bytes)]
    counted = [moment for moment in run.moments if not math.isnan(moment.batches)]
    batches = counted[-1].batches - counted[0].batches if counted else 0.0
    requests = counted[-1].batched_requests - counted[0].batched_requests if counted else 0.0
    return {
        "cores_mean": sum(cores) / len(cores) if cores else math.nan,
        "queue_max_s": max(queues, default=math.nan),
        "resident_max_bytes": max(resident, default=math.nan),
        "resident_growth": growth([(moment.at_s, moment.service_bytes) for moment in within], run.duration_s),
        "requests_per_batch": requests / batches if batches else math.nan,
    }


def summary(run: Run, checks: Sequence[Check], slo_s: Seconds) -> dict[str, Any]:
    """All figures of a run for JSON; NaN becomes null."""
    tenants = grouped((sample for sample in run.samples if sample.tenant), lambda sample: sample.tenant)
    found: dict[str, Any] = {
        "scenario": run.options.scenario,
        "passed": all(check.passed for check in checks),
        "duration_s": run.duration_s,
        "seed": run.options.seed,
        "scale": run.options.scale,
        "offered_per_s": run.offered_per_s,
        "goodput_per_s": Totals.of(run.samples, slo_s).good / run.duration_s,
        **_totals(run.samples, slo_s),
        "by_length": {name: _totals(group, slo_s) for name, group in by_bucket(run.samples).items()},
        "by_tenant": {name: _totals(group, slo_s) for name, group in tenants.items()},
        "plans": dict(Counter(sample.plan for sample in run.samples if sample.outcome is Outcome.ANSWERED)),
        "client": client(run),
        "service": service(run),
        "happened": run.happened,
        "reasons": reasons(run.samples),
        "checks": [{**check.model_dump(), "passed": check.passed} for check in checks],
        "slo_s": slo_s,
    }
    return {name: _finite(value) for name, value in found.items()}


def bucket_label(name: str) -> str:
    index = BUCKET_NAMES.index(name)
    if index == len(BUCKETS):
        return f"over {BUCKETS[-1]:,}"
    return f"{1 if index == 0 else BUCKETS[index - 1] + 1:,} to {BUCKETS[index]:,}"


def _totals(samples: Sequence[Sample], slo_s: Seconds) -> dict[str, Any]:
    totals = Totals.of(samples, slo_s)
    return {**asdict(totals), "usd_per_1000": totals.usd_per_1000}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(endpoint: str, bucket: int, plan: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    seen, outcomes = latencies(samples), Counter(sample.outcome for sample in samples)
    counts = (f"{outcomes[outcome]}" for outcome in Outcome)
    times = ("-" if not seen else f"{1e3 * percentile(seen, percent):.2f}" for percent in (50, 95, 99))
    device_s = sum(sample.device_s for sample in samples)
    return (endpoint, bucket_label(BUCKET_NAMES[bucket]), plan, *counts, *times, f"{device_s:.3f}")


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns: the first three left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = enumerate(zip(row, widths, strict=True))
        return "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width) for index, (cell, width) in padded
        ).rstrip()

    head, *rest = (line(row) for row in table)
    return [head, "-" * len(head), *rest]
