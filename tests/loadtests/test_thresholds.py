"""Thresholds: what passes, what does not, and that a wrong file is refused."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from loadtests.samples import Outcome, Sample
from loadtests.thresholds import DEFAULT, Limits, Thresholds, judge, judge_memory, read
from tests.loadtests.common import SLO_S, sample


def missed(limits: Limits, *samples: Sample) -> list[str]:
    return [check.name for check in judge(samples, limits, SLO_S) if not check.passed]


def test_latencies_are_judged_by_length() -> None:
    short, long = [sample(latency_s=0.1)] * 99, [sample(latency_s=3.0, length=20000)]
    assert missed(Limits(p99_s={"512": 0.1001, "32768": 3.0001}), *short, *long) == []
    assert missed(Limits(p99_s={"512": 0.09, "32768": 2.9}), *short, *long) == [
        "p99_s, length 512",
        "p99_s, length 32768",
    ]
    slow_tail = [*short[:50], *[sample(latency_s=9.0)] * 2]
    assert missed(Limits(p50_s={"512": 0.2}, p99_s={"512": 1.0}), *slow_tail) == ["p99_s, length 512"]


def test_a_missing_latency_is_missed() -> None:
    assert missed(Limits(p99_s={"more": 1000.0}), sample()) == ["p99_s, length more"]
    assert missed(Limits()) == ["answered"]


def test_shares_are_of_what_was_offered() -> None:
    samples = [*[sample()] * 8, sample(outcome=Outcome.REFUSED), sample(outcome=Outcome.FAILED)]
    assert missed(Limits(goodput=0.8, refused=0.1, failed=0.1), *samples) == []
    assert missed(Limits(goodput=0.81, refused=0.09, failed=0.09), *samples) == ["goodput", "refused", "failed"]
    assert missed(Limits(), *samples) == ["failed"]  # none may, where nothing is said


def test_an_endpoint_may_have_its_own_limit() -> None:
    """One lost request of many is over no share, but what the proxy repeats must not be lost at all."""
    samples = [*[sample()] * 999, sample(outcome=Outcome.FAILED)]
    assert missed(Limits(failed=0.01), *samples) == []
    chaos = read(DEFAULT).scenarios["chaos"]
    assert missed(chaos, *samples) == ["failed, embeddings"]


def test_a_tenant_is_judged_by_its_own_requests() -> None:
    limits = Limits(tenants={"modest": Limits(goodput=1.0), "greedy": Limits(refused=0.0)})
    samples = [sample(tenant="modest"), sample(tenant="greedy"), sample(tenant="greedy", outcome=Outcome.REFUSED)]
    assert missed(limits, *samples) == ["greedy: refused"]


@pytest.mark.parametrize(("growth", "passed"), [(0.04, True), (0.06, False), (-0.5, True), (math.nan, False)])
def test_memory_is_judged_by_its_growth(growth: float, passed: bool) -> None:
    assert [check.passed for check in judge_memory(growth, 600.0, Limits(resident_growth=0.05))] == [passed]
    assert judge_memory(growth, 600.0, Limits()) == []
    assert judge_memory(growth, 60.0, Limits(resident_growth=0.05)) == []


def test_the_file_in_the_repository_is_read() -> None:
    known = read(DEFAULT)
    assert known.slo_s == SLO_S
    assert known.scenarios["tenants"].tenants["modest"].refused == 0.0


@pytest.mark.parametrize(
    "text",
    [
        '{"slo_s": {"512": 1}, "scenarios": {}}',
        '{"slo_s": {"512": 1, "4096": 1, "32768": 1, "262144": 1, "more": 1, "77": 1}, "scenarios": {}}',
        '{"scenarios": {}}',
    ],
)
def test_a_wrong_file_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Thresholds.model_validate_json(text)
    with pytest.raises(ValidationError, match=r"length buckets: expected 512, .*got \['513'\]"):
        Limits(p99_s={"513": 1.0})
    with pytest.raises(ValidationError):
        Limits.model_validate({"goodputt": 0.5})
