"""What a scenario must reach, from a file: latencies by length, goodput, and how many may be refused or fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loadtests.figures import BUCKET_NAMES, Totals, by_bucket
from loadtests.mix import Endpoint
from loadtests.samples import Sample

DEFAULT = Path(__file__).parent / "thresholds.json"
Seconds = dict[str, float]
STEADY_S = 300.0


def _known(seconds: Seconds) -> Seconds:
    if unknown := seconds.keys() - set(BUCKET_NAMES):
        raise ValueError(f"{sorted(unknown)} are no length buckets; they are {', '.join(BUCKET_NAMES)}")
    return seconds


class Limits(BaseModel):
    """Seconds by length bucket, shares of what was offered. What is not named is not judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_s: Seconds = {}
    p99_s: Seconds = {}
    goodput: float | None = Field(None, ge=0, le=1, description="Least share answered within its SLO.")
    refused: float | None = Field(None, ge=0, le=1, description="Largest share.")
    failed: float = Field(0.0, ge=0, le=1, description="Largest share.")
    failed_of: dict[Endpoint, float] = Field({}, description="Largest share of what an endpoint was asked.")
    resident_growth: float | None = Field(
        None,
        gt=0,
        description="Largest growth of the replicas' memory from the second quarter to the last of a run of 5 minutes.",
    )
    tenants: dict[str, Limits] = {}

    _buckets = field_validator("p50_s", "p99_s")(_known)


class Thresholds(BaseModel):
    """`slo_s`: the latency that an answer of each length should have; goodput counts those that do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slo_s: Seconds
    scenarios: dict[str, Limits]

    _buckets = field_validator("slo_s")(_known)

    @model_validator(mode="after")
    def _complete(self) -> Thresholds:
        if missing := set(BUCKET_NAMES) - self.slo_s.keys():
            raise ValueError(f"slo_s lacks {sorted(missing)}")
        return self


class Check(BaseModel):
    """One comparison. A latency that nobody saw fails: a test without its long requests proves nothing."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {'>=' if self.at_least else '<='} {self.limit:g}"


def read(path: Path) -> Thresholds:
    """ValidationError (a ValueError) or OSError say what is wrong."""
    return Thresholds.model_validate_json(path.read_text())


def judge_memory(resident_growth: float, duration_s: float, limits: Limits) -> list[Check]:
    """NaN fails: nobody looked. A service that has just started still grows."""
    if limits.resident_growth is None or duration_s < STEADY_S:
        return []
    return [Check(name="resident_growth", value=resident_growth, limit=limits.resident_growth)]


def judge(samples: Sequence[Sample], limits: Limits, slo_s: Seconds, prefix: str = "") -> list[Check]:
    totals, buckets = Totals.of(samples, slo_s), by_bucket(samples)
    found = [Check(name=f"{prefix}answered", value=totals.answered, limit=1, at_least=True)]
    for name in ("p50_s", "p99_s"):
        for bucket, limit in getattr(limits, name).items():
            value = getattr(Totals.of(buckets.get(bucket, []), slo_s), name)
            found.append(Check(name=f"{prefix}{name}, length {bucket}", value=value, limit=limit))
    if limits.goodput is not None:
        value = totals.share("good")
        found.append(Check(name=f"{prefix}goodput", value=value, limit=limits.goodput, at_least=True))
    if limits.refused is not None:
        found.append(Check(name=f"{prefix}refused", value=totals.share("refused"), limit=limits.refused))
    found.append(Check(name=f"{prefix}failed", value=totals.share("failed"), limit=limits.failed))
    for endpoint, limit in limits.failed_of.items():
        own = Totals.of([one for one in samples if one.endpoint == endpoint], slo_s)
        found.append(Check(name=f"{prefix}failed, {endpoint}", value=own.share("failed"), limit=limit))
    for tenant, its in limits.tenants.items():
        found += judge([one for one in samples if one.tenant == tenant], its, slo_s, f"{tenant}: ")
    return found
