"""Usage of requests: shares add up to the device time, failures included, and idle time is the rest."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.billing.ledger import LedgerError, LocalLedger
from service.config import Budget, Config, TenantConfig
from service.core.answer import Answer
from service.core.request import AttentionRequest
from service.engine.engine import Engine
from service.engine.workloads.attention import AttentionWorkload
from service.engine.workloads.forward import ForwardWorkload
from service.errors import FarsightError, Kind
from service.telemetry.metrics import Metrics
from tests.engine.test_engine import attention, embed, run
from tests.engines import another, until_reported, until_started

TENANTS = (
    TenantConfig(name="rich"),
    TenantConfig(name="poor", budgets=(Budget(device_s=3600, per="hour", burst=0.05),)),
    TenantConfig(name="dear", budgets=(Budget(usd=1e-9, per="day"),)),
)


@dataclass
class Metered:
    """An engine with a usage meter."""

    engine: Engine
    ledger: LocalLedger
    registry: CollectorRegistry
    is_closed: bool = False

    def requests(self, group_by: str = "outcome") -> dict[str, dict[str, Any]]:
        self.engine.meter.tick()  # type: ignore[union-attr]
        return {group[group_by]: group for group in self.ledger.usage(0, 1e12, (group_by,), None)["groups"]}

    def metric(self, name: str) -> float:
        samples = [sample for metric in self.registry.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name == f"farsight_{name}")


@pytest.fixture
def metered(engine: Engine, tmp_path: Path) -> Iterator[Metered]:
    config = engine.config.model_copy(update={"state_dir": tmp_path, "tenants": TENANTS, "batch_budget_s": 0.01})
    registry = CollectorRegistry()
    ledger = LocalLedger(config.ledger)
    other = another(engine, config, metrics=Metrics(registry), ledger=ledger)
    metered = Metered(other, ledger, registry)
    yield metered
    if not metered.is_closed:
        other.close()
    assert not list(config.write_ahead_dir.iterdir())


def of(tenant: str, request: AttentionRequest) -> AttentionRequest:
    return replace(request, tenant=tenant)


def test_a_request_is_recorded_before_the_caller_gets_its_answer(metered: Metered) -> None:
    answer: Answer = run(metered.engine.submit(attention(128)))
    found = metered.requests()["ok"]
    assert (found["requests"], found["tokens"]) == (1, 128)
    assert found["device_s"] == pytest.approx(answer.usage.device_s)
    assert found["cost_usd"] == found["charged_usd"] == pytest.approx(answer.usage.cost_usd)
    assert found["flops"] == answer.usage.flops


def test_shares_add_up_to_the_device_time_under_load(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched, preempted, failing, late and cancelled requests; measured independently, on the device thread."""
    engine, draw, measured = metered.engine, random.Random(3), []

    def timed(compute: Any) -> Any:
        def run(self: Any, works: Any, checkpoint: Any) -> Any:
            begin_s, paused = engine.clock(), []

            def between() -> None:
                before_s = engine.clock()
                inside = sum(measured)
                checkpoint()
                if sum(measured) > inside:  # other work ran
                    paused.append(engine.clock() - before_s)

            try:
                return compute(self, works, between)
            finally:
                measured.append(engine.clock() - begin_s - sum(paused))

        return run

    for workload in (AttentionWorkload, ForwardWorkload):
        monkeypatch.setattr(workload, "run", timed(workload.run))

    async def send(index: int) -> None:
        kind = draw.randrange(6)
        await asyncio.sleep(draw.random())
        options: dict[str, Any] = {"timeout_s": 0.06} if kind == 1 else {}
        request: Any = attention(draw.choice([64, 512, 4096]), index, mode=draw.choice(["dense", "chunked"]), **options)
        if kind == 2:
            request = embed(*["some text to embed"] * draw.randrange(1, 20))
        if kind == 3:  # scores overflow on the device: 422 after it ran
            request.query.fill_(1e30)
            request.key.fill_(1e30)
        work = asyncio.ensure_future(engine.submit(request))
        if kind == 4:
            await asyncio.sleep(draw.random() / 20)
            work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    async def all_of_them() -> None:
        await asyncio.gather(*(send(index) for index in range(150)))
        while engine.execution.device.is_running:  # what was left behind stops at its next checkpoint
            await until_reported(engine)
        await asyncio.sleep(0.01)

    run(all_of_them())
    engine.execution.device.stop()
    found = metered.requests()
    assert {"ok", "cancelled", "invalid"} <= set(found), found
    total_s = sum(measured)
    capacity = engine.capacity()
    # the difference: the runner's own few microseconds around each run are counted, too
    assert sum(group["device_s"] for group in found.values()) == pytest.approx(capacity.used_s, rel=1e-3)
    assert metered.metric("device_seconds_total") == pytest.approx(capacity.used_s, rel=1e-3)
    assert total_s == pytest.approx(capacity.used_s, rel=2e-2)


def test_used_and_idle_time_add_up_to_wall_time(metered: Metered) -> None:
    engine = metered.engine
    for index in range(5):
        run(engine.submit(attention(512, index)))
    now_s = engine.clock()
    capacity = engine.capacity()
    assert capacity.used_s + capacity.idle_s == pytest.approx(
        now_s - engine.execution.device._loop._started_s, rel=1e-3
    )
    assert capacity.used_s == pytest.approx(metered.metric("device_seconds_total"), rel=1e-6)
    for _ in range(30):
        engine.meter.tick()  # type: ignore[union-attr]
    recorded = metered.ledger.usage(0, 1e12, (), None)["capacity"]
    assert recorded["used_s"] == pytest.approx(capacity.used_s)
    assert recorded["idle_s"] >= capacity.idle_s
    assert recorded["usd"] == pytest.approx((recorded["used_s"] + recorded["idle_s"]) * engine.hour_usd / 3600)


def test_a_spent_budget_blocks_only_its_tenant(metered: Metered) -> None:
    slow = attention(4096, heads=8, mode="chunked")

    async def spend() -> list[Any]:
        work = [metered.engine.submit(of("poor", slow)) for _ in range(12)]
        return await asyncio.gather(*work, return_exceptions=True)

    refused = [result for result in run(spend()) if isinstance(result, FarsightError)]
    assert refused
    assert {error.kind for error in refused} <= {Kind.OVER_BUDGET, Kind.TOO_LARGE}
    assert "budget device_s/hour of tenant 'poor'" in refused[0].message
    assert isinstance(run(metered.engine.submit(of("rich", attention()))), Answer)
    assert set(metered.requests()) <= {"ok"}  # refused requests were never accepted


def test_a_request_over_a_budgets_capacity_is_refused_with_both_numbers(metered: Metered) -> None:
    with pytest.raises(
        FarsightError, match=r"at most 1e-09 usd, the capacity of budget usd/day of tenant 'dear', got"
    ) as caught:
        run(metered.engine.submit(of("dear", attention(2048))))
    assert caught.value.kind is Kind.TOO_LARGE


@pytest.mark.parametrize(("kind", "pays"), [(Kind.INVALID, True), (Kind.OUT_OF_MEMORY, False), (None, False)])
def test_failures_of_the_service_are_not_charged(
    metered: Metered, monkeypatch: pytest.MonkeyPatch, kind: Kind | None, pays: bool
) -> None:
    compute = AttentionWorkload.run

    def fail(*arguments: Any) -> Any:
        compute(*arguments)
        raise FarsightError(kind, "no") if kind else RuntimeError("a bug")

    monkeypatch.setattr(AttentionWorkload, "run", fail)
    with pytest.raises(FarsightError):
        run(metered.engine.submit(attention(1024, mode="dense")))
    found = metered.requests()[(kind or Kind.INTERNAL).value]
    assert found["requests"] == 1
    assert found["device_s"] > 0
    assert (found["charged_usd"] > 0) is pays
    assert found["cost_usd"] > 0


def test_a_cancelled_request_is_charged_for_its_device_time(metered: Metered) -> None:
    async def leave() -> None:
        work = asyncio.ensure_future(metered.engine.submit(attention(8192, heads=8, mode="chunked")))
        await until_started(metered.engine)
        await asyncio.sleep(0.02)
        work.cancel()
        while metered.engine.execution.device._loop.running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)

    run(leave())
    found = metered.requests()["cancelled"]
    assert found["device_s"] > 0.015
    assert found["charged_usd"] == found["cost_usd"] > 0


def test_a_request_that_runs_at_the_close_is_charged_and_recorded(metered: Metered) -> None:
    engine = metered.engine

    async def leave_and_close() -> None:
        work = asyncio.ensure_future(engine.submit(of("poor", attention(64))))
        await work
        work = asyncio.ensure_future(engine.submit(attention(8192, heads=8, mode="chunked")))
        await until_started(engine)
        await asyncio.sleep(0.02)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        engine.close()  # on the loop, as Serve does

    run(leave_and_close())
    metered.is_closed = True
    found = {group["outcome"]: group for group in metered.ledger.usage(0, 1e12, ("outcome",), None)["groups"]}
    assert found["cancelled"]["device_s"] > 0.015
    assert "lost" not in found
    assert all(lease.balance == 0 for lease in engine.meter.leases())  # type: ignore[union-attr]


def test_a_slow_ledger_delays_a_request_until_its_timeout_at_most(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> Any:
        time.sleep(0.3)
        raise LedgerError("slow")

    monkeypatch.setattr(metered.ledger, "lease", slow)
    with pytest.raises(FarsightError, match="asking for the budget") as caught:
        run(metered.engine.submit(of("poor", attention(16, timeout_s=0.2))))
    assert caught.value.kind is Kind.DEADLINE
    assert metered.requests() == {}


def test_a_request_whose_answer_fails_is_settled(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(metered.engine._settlement, "_answer", bug)
    with pytest.raises(FarsightError) as caught:
        run(metered.engine.submit(attention()))
    assert caught.value.kind is Kind.INTERNAL
    found = metered.requests()
    assert found["internal"]["charged_usd"] == 0 < found["internal"]["cost_usd"]


def test_a_bug_in_one_step_of_the_meter_does_not_stop_the_others(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(metered.engine.meter, "_export", bug)
    run(metered.engine.submit(attention()))
    assert set(metered.requests()) == {"ok"}
    assert metered.metric("ledger_errors_total") >= 1


def test_a_log_that_cannot_be_written_refuses_and_releases_the_reservation(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError("no space left on device")

    meter = metered.engine.meter
    assert meter is not None
    monkeypatch.setattr(meter._log, "accepted", full)
    with pytest.raises(FarsightError, match="ledger cannot be written") as caught:
        run(metered.engine.submit(of("poor", attention())))
    assert caught.value.kind is Kind.UNAVAILABLE
    monkeypatch.undo()
    held = meter.leases()[0].balance
    run(metered.engine.submit(of("poor", attention())))
    assert meter.leases()[0].balance < held


def test_a_meter_on_a_full_disk_cannot_tell_usage_and_gives_its_leases_back(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    meter = metered.engine.meter
    assert meter is not None
    run(metered.engine.submit(of("poor", attention())))
    (lease,) = meter.leases()
    monkeypatch.setattr(meter._log, "capacity", full)
    with pytest.raises(FarsightError) as caught:
        run(metered.engine.usage(0, 1e12, (), None))
    assert caught.value.kind is Kind.UNAVAILABLE
    assert metered.metric("ledger_errors_total") == 1
    assert lease.balance > 0
    with pytest.raises(OSError, match="no space left"):
        metered.engine.close()
    metered.is_closed = True
    assert lease.balance == 0
    assert metered.ledger.usage(0, 1e12, (), None)["groups"][0]["requests"] == 1


def test_prices_by_device() -> None:
    prices = Config(price_per_device_hour_usd={"cpu": 0.1, "NVIDIA": 2.0, "NVIDIA H100": 3.0, "cuda": 1.0})
    assert prices.hour_usd("cpu", "cpu") == 0.1
    assert prices.hour_usd("NVIDIA H100 80GB HBM3", "cuda") == 3.0
    assert prices.hour_usd("NVIDIA L4", "cuda") == 2.0
    assert prices.hour_usd("Other", "cuda") == 1.0
    with pytest.raises(ValueError, match="no price for tpu"):
        prices.hour_usd("tpu")


def test_a_price_is_known_while_the_ledger_is_away(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise LedgerError("away")

    monkeypatch.setattr(metered.ledger, "lease", away)
    request = of("poor", attention(128))
    with pytest.raises(FarsightError, match="cannot be checked now") as refused:
        run(metered.engine.submit(request))
    assert refused.value.kind is Kind.UNAVAILABLE
    estimate = run(metered.engine.priced(request))
    assert not estimate.would_admit
    assert estimate.candidates
    assert "cannot be checked now" in estimate.reason
    assert run(metered.engine.priced(of("rich", attention(128)))).would_admit
