"""The arithmetic of a run: percentiles, length buckets, goodput, and both over time and against the offered load."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.samples import Outcome, Sample

# tokens up to and including, as in the metrics and alerts; the last bucket is "more"
BUCKETS = (512, 4096, 32768, 262144)
BUCKET_NAMES = (*map(str, BUCKETS), "more")


def bucket_of(length: int) -> str:
    return BUCKET_NAMES[bisect_left(BUCKETS, length)]


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest rank: a latency that was really seen; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def latencies(samples: Iterable[Sample]) -> list[float]:
    return [one.latency_s for one in samples if one.outcome is Outcome.ANSWERED]


def is_good(sample: Sample, slo_s: Mapping[str, float]) -> bool:
    """Answered, within the bound of its length."""
    return sample.outcome is Outcome.ANSWERED and sample.latency_s <= slo_s[bucket_of(sample.length)]


@dataclass(frozen=True, slots=True)
class Totals:
    """Shares are of what was offered; seconds are NaN where nothing was answered."""

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
            refused=sum(one.outcome is Outcome.REFUSED for one in samples),
            failed=sum(one.outcome is Outcome.FAILED for one in samples),
            good=sum(is_good(one, slo_s) for one in samples),
            p50_s=percentile(seen, 50),
            p95_s=percentile(seen, 95),
            p99_s=percentile(seen, 99),
            device_s=sum(one.device_s for one in samples),
            cost_usd=sum(one.cost_usd for one in samples),
        )

    def share(self, name: str) -> float:
        """Of answered, refused, failed or good; 0 of nothing."""
        return getattr(self, name) / self.offered if self.offered else 0.0

    @property
    def usd_per_1000(self) -> float:
        """Of answers; NaN where there are none."""
        return 1000 * self.cost_usd / self.answered if self.answered else math.nan


def grouped(samples: Iterable[Sample], key: Callable[[Sample], Any]) -> dict[Any, list[Sample]]:
    """By key, in the order of the keys."""
    groups: dict[Any, list[Sample]] = defaultdict(list)
    for one in samples:
        groups[key(one)].append(one)
    return {key: groups[key] for key in sorted(groups)}


def by_bucket(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """By length, the shortest first."""
    groups = grouped(samples, lambda one: bisect_left(BUCKETS, one.length))
    return {BUCKET_NAMES[place]: group for place, group in groups.items()}


def windows(samples: Iterable[Sample], duration_s: float, width_s: float) -> list[tuple[float, list[Sample]]]:
    """(middle, those that were due in it) of equal parts of the run, empty ones too."""
    count = max(1, round(duration_s / width_s))
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for one in samples:
        parts[min(count - 1, int(one.at_s / duration_s * count))].append(one)
    return [((index + 0.5) * duration_s / count, part) for index, part in enumerate(parts)]


def by_load(samples: Sequence[Sample], duration_s: float, levels: int = 5) -> list[tuple[float, list[Sample]]]:
    """(offered requests/s, samples), ascending: the run's windows sorted by how much was offered, in equal groups."""
    width_s = max(2.0, duration_s / 30)
    parts = sorted(windows(samples, duration_s, width_s), key=lambda part: len(part[1]))
    each_s, found = duration_s / len(parts), []
    for level in range(levels):
        group = parts[level * len(parts) // levels : (level + 1) * len(parts) // levels]
        if together := [one for _, part in group for one in part]:
            found.append((len(together) / (each_s * len(group)), together))
    return found


def growth(values: Sequence[tuple[float, float]], duration_s: float) -> float:
    """Of (seconds, value): the median of the run's last quarter over that of its second one, less 1.

    The first quarter warms up, and a median does not see one large request. NaN where a quarter has no values.
    """
    before, after = (
        [value for at_s, value in values if part <= at_s / duration_s < part + 0.25 and value > 0]
        for part in (0.25, 0.75)
    )
    return percentile(after, 50) / percentile(before, 50) - 1 if before and after else math.nan


def in_flight(samples: Iterable[Sample], times_s: Sequence[float]) -> list[int]:
    """Requests that were due and not yet ended at these moments."""
    begun, ended = sorted(one.at_s for one in samples), sorted(one.ended_s for one in samples)
    return [bisect_left(begun, at_s) - bisect_left(ended, at_s) for at_s in times_s]
