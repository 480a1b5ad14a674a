"""What is counted, with how many series, and what counting costs a request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.billing.tenants import Tenants
from service.config import Config, TenantConfig
from service.core.answer import (
    Answer,
    ErrorReport,
    Timing,
    Usage,
)
from service.core.plan import Cost, Plan, PlanKind
from service.errors import Kind
from service.telemetry.metrics import Metrics, memory_limit_bytes

ROOT = Path(__file__).parents[2]


def answer(tokens: int = 100, kind: PlanKind = PlanKind.SPARSE, joules: float | None = None) -> Answer:
    return Answer(
        id="r",
        tensors={},
        plan=Plan(kind, Cost(1, 1, 1, 1), 0.01, "test"),
        error=ErrorReport("measured", relative_l2_upper=0.01) if kind is PlanKind.SPARSE else ErrorReport(),
        usage=Usage(tokens, 10, 40, 100, 400, 0.01, 1, 2e-6, 6e-6, joules=joules),
        timing=Timing(queue_s=0.001, device_s=0.01, total_s=0.02),
        density=0.25 if kind is PlanKind.SPARSE else None,
    )


# names of tenants as labels, as the engine and the usage meter make them
label = Tenants(Config(tenants=(TenantConfig(name="acme", key_sha256=("0" * 64,)),))).label


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(0, "512"), (512, "512"), (513, "4096"), (4096, "4096"), (32768, "32768"), (262144, "262144"), (262145, "more")],
)
def test_durations_are_told_by_length(registry: CollectorRegistry, tokens: int, length: str) -> None:
    Metrics(registry).answered("attention", answer(tokens), "default")
    labels = {"endpoint": "attention", "model": "attention", "length": length}
    assert registry.get_sample_value("farsight_request_duration_seconds_count", labels) == 1


def test_failures_have_no_length(registry: CollectorRegistry) -> None:
    Metrics(registry).failed("attention", "attention", Kind.DEADLINE, 3.0)
    labels = {"endpoint": "attention", "model": "attention", "length": "unknown"}
    assert registry.get_sample_value("farsight_request_duration_seconds_sum", labels) == 3


def test_tokens_and_energy_are_counted_by_tenant_model_and_plan(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    metrics.answered("attention", answer(100), "acme")
    metrics.spent("attention", "sparse", "acme", 0.5, 2e-6)
    labels = {"tenant": "acme", "model": "attention", "plan": "sparse"}
    assert registry.get_sample_value("farsight_tokens_total", labels) == 100
    assert registry.get_sample_value("farsight_device_seconds_total", labels) == 0.5
    assert registry.get_sample_value("farsight_cost_usd_total", labels) == 2e-6
    assert registry.get_sample_value("farsight_energy_joules_total", labels) is None, "not measured is not zero"
    metrics.answered("attention", answer(50), "acme")
    metrics.spent("attention", "sparse", "acme", 0.25, 1e-6, joules=1.5)
    assert registry.get_sample_value("farsight_tokens_total", labels) == 150
    assert registry.get_sample_value("farsight_device_seconds_total", labels) == 0.75
    assert registry.get_sample_value("farsight_energy_joules_total", labels) == 1.5


def test_what_a_device_costs_whether_it_works_or_not(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    value = registry.get_sample_value
    metrics.idle(2.0)
    assert value("farsight_idle_energy_joules_total") is None, "not measured is not zero"
    metrics.idle(3.0, joules=30.0)
    metrics.idle(0.0, joules=10.0)
    metrics.allocated(0.5)
    metrics.budget_used("acme", "month", 0.8)
    metrics.budget_refused("acme")
    metrics.budget_refused(label("nobody knows them"))
    assert value("farsight_device_idle_seconds_total") == 5
    assert value("farsight_idle_energy_joules_total") == 40
    assert value("farsight_allocated_cost_usd_total") == 0.5
    assert value("farsight_budget_used_ratio", {"tenant": "acme", "budget": "month"}) == 0.8
    assert value("farsight_budget_refused_total", {"tenant": "acme"}) == 1
    assert value("farsight_budget_refused_total", {"tenant": "unknown"}) == 1


def test_memory_is_told_with_its_limit(registry: CollectorRegistry) -> None:
    Metrics(registry)
    resident = registry.get_sample_value("farsight_resident_memory_bytes")
    limit = registry.get_sample_value("farsight_memory_limit_bytes")
    assert resident is not None
    assert limit == memory_limit_bytes()
    status = Path("/proc/self/status").read_text()
    told = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident == pytest.approx(told * 1024, rel=0.1)
    assert resident < limit


def series(registry: CollectorRegistry) -> int:
    return sum(len(metric.samples) for metric in registry.collect())


def test_made_up_tenants_are_one_series(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    for tenant in ("acme", "default", "made up"):
        for tokens in (1, 513, 4097):
            metrics.answered("attention", answer(tokens), label(tenant))
        metrics.spent("attention", "sparse", label(tenant), 0.1, 1e-6)
        metrics.budget_refused(label(tenant))
    before = series(registry)
    for index in range(10_000):
        metrics.answered("attention", answer(index), label("made up"))
        metrics.answered("attention", answer(), label(f"tenant {index}"))
        metrics.spent("attention", "sparse", label(f"tenant {index}"), 0.1, 1e-6)
        metrics.budget_refused(label(f"tenant {index}"))
    assert series(registry) == before
    labels = {"tenant": "unknown", "model": "attention", "plan": "sparse"}
    assert registry.get_sample_value("farsight_tokens_total", labels) == 4611 + 100 * 10_000 + sum(range(10_000))


COST = """
import sys, time
from pathlib import Path
from prometheus_client import CollectorRegistry
from service.core.plan import PlanKind
from service.telemetry.metric_files import share_files
share_files(Path(sys.argv[1]))
from service.telemetry.metrics import Metrics
from tests.telemetry.test_metrics import answer
metrics = Metrics(CollectorRegistry())
one = answer(joules=1.0)
def round_s():
    start_s = time.process_time()
    for _ in range(500):
        metrics.answered("attention", one, "default")
    return (time.process_time() - start_s) / 500
print(min(round_s() for _ in range(20)))
"""


def test_counting_an_answer_takes_50_microseconds_at_most(tmp_path: Path) -> None:
    """Of a sparse answer with energy (the most that is counted), in files as the replicas do; CPU time, best of 20."""
    result = subprocess.run(
        [sys.executable, "-c", COST, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert float(result.stdout) < 50e-6
    assert list(tmp_path.glob("counter_*.db")), "it was not measured in files"
