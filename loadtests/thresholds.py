"""Thresholds of the scenarios, from a file: latencies by length, goodput, shares of refused and failed requests."""

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
        raise ValueError(f"length buckets: expected {', '.join(BUCKET_NAMES)}, got {sorted(unknown)}")
    return seconds


class Limits(BaseModel):
    """Seconds by length bucket, and shares of the offered requests. What is not set is not checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_s: Seconds = {}
    p99_s: Seconds = {}
    goodput: float | None = Field(None, ge=0, le=1, description="Minimum share answered within the SLO.")
    refused: float | None = Field(None, ge=0, le=1, description="Maximum share.")
    failed: float = Field(0.0, ge=0, le=1, description="Maximum share.")
    failed_of: dict[Endpoint, float] = Field({}, description="Maximum share of the requests to an endpoint.")
    resident_growth: float | None = Field(
        None,
        gt=0,
        description="Maximum growth of the replicas' memory from the second to the last quarter; runs of 5 minutes.",
    )
    tenants: dict[str, Limits] = {}

    _buckets = field_validator("p50_s", "p99_s")(_known)


class Thresholds(BaseModel):
    """`slo_s`: the latency limit for each length within which an answer counts as goodput."""

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
    """One comparison. A missing latency (NaN) fails: a test without its long requests proves nothing."""

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
    """Read a file of thresholds. Raises ValidationError (a ValueError) or OSError."""
    return Thresholds.model_validate_json(path.read_text())


def judge_memory(resident_growth: float, duration_s: float, limits: Limits) -> list[Check]:
    """Check the growth of memory. Not in short runs, because a service that has just started still grows. NaN fails."""
    if limits.resident_growth is None or duration_s < STEADY_S:
        return []
    return [Check(name="resident_growth", value=resident_growth, limit=limits.resident_growth)]


def judge(samples: Sequence[Sample], limits: Limits, slo_s: Seconds, prefix: str = "") -> list[Check]:
    """Compare the samples with the limits, tenants included."""
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
        part = Totals.of([sample for sample in samples if sample.endpoint == endpoint], slo_s)
        found.append(Check(name=f"{prefix}failed, {endpoint}", value=part.share("failed"), limit=limit))
    for tenant, tenant_limits in limits.tenants.items():
        found += judge([sample for sample in samples if sample.tenant == tenant], tenant_limits, slo_s, f"{tenant}: ")
    return found
