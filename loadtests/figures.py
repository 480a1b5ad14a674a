"""Arithmetic of a run: percentiles, length buckets, goodput, over time and against the offered load."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.samples import Outcome, Sample

# inclusive upper limits in tokens, as in the metrics and alerts; the last bucket is "more"
BUCKETS = (512, 4096, 32768, 262144)
BUCKET_NAMES = (*map(str, BUCKETS), "more")


def bucket_of(length: int) -> str:
    return BUCKET_NAMES[bisect_left(BUCKETS, length)]


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest rank, so the result is a measured value; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def latencies(samples: Iterable[Sample]) -> list[float]:
    """Seconds of the answered requests."""
    return [sample.latency_s for sample in samples if sample.outcome is Outcome.ANSWERED]


def is_good(sample: Sample, slo_s: Mapping[str, float]) -> bool:
    """Whether it was answered within the SLO of its length."""
    return sample.outcome is Outcome.ANSWERED and sample.latency_s <= slo_s[bucket_of(sample.length)]


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts and sums of a set of samples; percentiles are NaN if nothing was answered."""

    offered: int
    answered: int
    refused: int
    failed: int
    good: int
    p50_s: float
    p95_s: float
    p99_s: float
    device_s: float
    cost_usd: float

    @classmethod
    def of(cls, samples: Sequence[Sample], slo_s: Mapping[str, float]) -> Totals:
        seen = latencies(samples)
        return cls(
            offered=len(samples),
            answered=len(seen),
            refused=sum(sample.outcome is Outcome.REFUSED for sample in samples),
            failed=sum(sample.outcome is Outcome.FAILED for sample in samples),
            good=sum(is_good(sample, slo_s) for sample in samples),
            p50_s=percentile(seen, 50),
            p95_s=percentile(seen, 95),
            p99_s=percentile(seen, 99),
            device_s=sum(sample.device_s for sample in samples),
            cost_usd=sum(sample.cost_usd for sample in samples),
        )

    def share(self, name: str) -> float:
        """Share of the offered requests that are answered, refused, failed or good (`name`); 0 without requests."""
        return getattr(self, name) / self.offered if self.offered else 0.0

    @property
    def usd_per_1000(self) -> float:
        """USD per 1,000 answers; NaN without answers."""
        return 1000 * self.cost_usd / self.answered if self.answered else math.nan


def grouped(samples: Iterable[Sample], key: Callable[[Sample], Any]) -> dict[Any, list[Sample]]:
    """Samples by key, in the order of the keys."""
    groups: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    return {key: groups[key] for key in sorted(groups)}


def by_bucket(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by length bucket, the shortest first."""
    groups = grouped(samples, lambda sample: bisect_left(BUCKETS, sample.length))
    return {BUCKET_NAMES[index]: group for index, group in groups.items()}


def windows(samples: Iterable[Sample], duration_s: float, width_s: float) -> list[tuple[float, list[Sample]]]:
    """(middle, samples due in it) for equal parts of the run, including empty ones."""
    count = max(1, round(duration_s / width_s))
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in samples:
        parts[min(count - 1, int(sample.at_s / duration_s * count))].append(sample)
    return [((index + 0.5) * duration_s / count, part) for index, part in enumerate(parts)]


def by_load(samples: Sequence[Sample], duration_s: float, levels: int = 5) -> list[tuple[float, list[Sample]]]:
    """(offered requests/s, samples), ascending: the windows of the run sorted by offered load, in equal groups."""
    width_s = max(2.0, duration_s / 30)
    parts = sorted(windows(samples, duration_s, width_s), key=lambda part: len(part[1]))
    each_s, found = duration_s / len(parts), []
    for level in range(levels):
        group = parts[level * len(parts) // levels : (level + 1) * len(parts) // levels]
        if together := [sample for _, part in group for sample in part]:
            found.append((len(together) / (each_s * len(group)), together))
    return found


def growth(values: Sequence[tuple[float, float]], duration_s: float) -> float:
    """Growth of (seconds, value): the median of the last quarter of the run over that of the second quarter, minus 1.

    The first quarter is warm-up, and a median ignores a single large request. NaN if a quarter has no values.
    """
    before, after = (
        [value for at_s, value in values if part <= at_s / duration_s < part + 0.25 and value > 0]
        for part in (0.25, 0.75)
    )
    return percentile(after, 50) / percentile(before, 50) - 1 if before and after else math.nan


def in_flight(samples: Iterable[Sample], times_s: Sequence[float]) -> list[int]:
    """Number of requests that were due and had not ended, at each of these times."""
    begun, ended = sorted(sample.at_s for sample in samples), sorted(sample.ended_s for sample in samples)
    return [bisect_left(begun, at_s) - bisect_left(ended, at_s) for at_s in times_s]
