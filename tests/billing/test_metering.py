"""What a request used, attributed and written down: shares add up, failures included, and idle time is the rest."""

from __future__ import annotations

import asyncio
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
class Paid:
    """An engine with books."""

    engine: Engine
    bank: LocalLedger
    registry: CollectorRegistry
    is_closed: bool = False

    def requests(self, group_by: str = "outcome") -> dict[str, dict[str, Any]]:
        self.engine.meter.tick()  # type: ignore[union-attr]
        return {one[group_by]: one for one in self.bank.usage(0, 1e12, (group_by,), None)["groups"]}

    def metric(self, name: str) -> float:
        samples = [sample for metric in self.registry.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name == f"farsight_{name}")


@pytest.fixture
def paid(engine: Engine, tmp_path: Path) -> Iterator[Paid]:
    config = engine.config.model_copy(update={"state_dir": tmp_path, "tenants": TENANTS, "batch_budget_s": 0.01})
    registry = CollectorRegistry()
    bank = LocalLedger(config.ledger)
    other = another(engine, config, metrics=Metrics(registry), ledger=bank)
    paid = Paid(other, bank, registry)
    yield paid
    if not paid.is_closed:
        other.close()
    assert not list(config.journal_dir.iterdir())


def of(tenant: str, request: AttentionRequest) -> AttentionRequest:
    return replace(request, tenant=tenant)


def test_an_answer_is_in_the_ledger_when_the_caller_has_it(paid: Paid) -> None:
    answer: Answer = run(paid.engine.submit(attention(128)))
    found = paid.requests()["ok"]
    assert (found["requests"], found["tokens"]) == (1, 128)
    assert found["device_s"] == pytest.approx(answer.usage.device_s)
    assert found["cost_usd"] == found["charged_usd"] == pytest.approx(answer.usage.cost_usd)
    assert found["flops"] == answer.usage.flops


def test_shares_add_up_to_the_device_time_under_load(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches, interrupted, failing, late and cancelled work; measured apart, where the device thread runs it."""
    engine, draw, measured = paid.engine, random.Random(3), []

    def timed(compute: Any) -> Any:
        def run(self: Any, works: Any, checkpoint: Any) -> Any:
            begin_s, paused = engine.clock(), []

            def between() -> None:
                before_s = engine.clock()
                inside = sum(measured)
                checkpoint()
                if sum(measured) > inside:  # others ran
                    paused.append(engine.clock() - before_s)

            try:
                return compute(self, works, between)
            finally:
                measured.append(engine.clock() - begin_s - sum(paused))

        return run

    for workload in (AttentionWorkload, ForwardWorkload):
        monkeypatch.setattr(workload, "run", timed(workload.run))

    async def one(index: int) -> None:
        kind = draw.randrange(6)
        await asyncio.sleep(draw.random())
        options: dict[str, Any] = {"timeout_s": 0.06} if kind == 1 else {}
        request: Any = attention(draw.choice([64, 512, 4096]), index, mode=draw.choice(["dense", "chunked"]), **options)
        if kind == 2:
            request = embed(*["some text to embed"] * draw.randrange(1, 20))
        if kind == 3:  # overflows on the device: 422 after it ran
            request.value.fill_(3e38)
            request.query.fill_(0.0)
        work = asyncio.ensure_future(engine.submit(request))
        if kind == 4:
            await asyncio.sleep(draw.random() / 20)
            work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(index) for index in range(150)))
        while engine.execution.device.is_running:  # what was left behind stops at its next checkpoint
            await until_reported(engine)
        await asyncio.sleep(0.01)

    run(all_of_them())
    engine.execution.device.stop()
    found = paid.requests()
    assert {"ok", "cancelled"} < set(found)
    total_s = sum(measured)
    capacity = engine.capacity()
    # the runner's own few microseconds around each run are counted, and are the difference
    assert sum(one["device_s"] for one in found.values()) == pytest.approx(capacity.used_s, rel=1e-3)
    assert paid.metric("device_seconds_total") == pytest.approx(capacity.used_s, rel=1e-3)
    assert total_s == pytest.approx(capacity.used_s, rel=2e-2)


def test_used_and_idle_are_the_time_that_the_device_was_there(paid: Paid) -> None:
    engine = paid.engine
    for index in range(5):
        run(engine.submit(attention(512, index)))
    now_s = engine.clock()
    capacity = engine.capacity()
    assert capacity.used_s + capacity.idle_s == pytest.approx(
        now_s - engine.execution.device._loop._started_s, rel=1e-3
    )
    assert capacity.used_s == pytest.approx(paid.metric("device_seconds_total"), rel=1e-6)
    for _ in range(30):
        engine.meter.tick()  # type: ignore[union-attr]
    told = paid.bank.usage(0, 1e12, (), None)["capacity"]
    assert told["used_s"] == pytest.approx(capacity.used_s)
    assert told["idle_s"] >= capacity.idle_s
    assert told["usd"] == pytest.approx((told["used_s"] + told["idle_s"]) * engine.hour_usd / 3600)


def test_a_budget_stops_its_tenant_and_nobody_else(paid: Paid) -> None:
    slow = attention(4096, heads=8, mode="chunked")

    async def spend() -> list[Any]:
        work = [paid.engine.submit(of("poor", slow)) for _ in range(12)]
        return await asyncio.gather(*work, return_exceptions=True)

    refused = [one for one in run(spend()) if isinstance(one, FarsightError)]
    assert refused
    assert {error.kind for error in refused} <= {Kind.OVER_BUDGET, Kind.TOO_LARGE}
    assert "budget device_s/hour of tenant 'poor'" in refused[0].message
    assert isinstance(run(paid.engine.submit(of("rich", attention()))), Answer)
    assert set(paid.requests()) <= {"ok"}  # what was refused was never accepted


def test_what_one_request_may_never_cost_is_told_with_both_numbers(paid: Paid) -> None:
    with pytest.raises(FarsightError, match=r"is over the 1e-09 usd that budget usd/day of tenant 'dear'") as caught:
        run(paid.engine.submit(of("dear", attention(2048))))
    assert caught.value.kind is Kind.TOO_LARGE


@pytest.mark.parametrize(("kind", "pays"), [(Kind.INVALID, True), (Kind.OUT_OF_MEMORY, False), (None, False)])
def test_failures_of_ours_cost_nothing(
    paid: Paid, monkeypatch: pytest.MonkeyPatch, kind: Kind | None, pays: bool
) -> None:
    compute = AttentionWorkload.run

    def fail(*arguments: Any) -> Any:
        compute(*arguments)
        raise FarsightError(kind, "no") if kind else RuntimeError("a bug")

    monkeypatch.setattr(AttentionWorkload, "run", fail)
    with pytest.raises(FarsightError):
        run(paid.engine.submit(attention(1024, mode="dense")))
    found = paid.requests()[(kind or Kind.INTERNAL).value]
    assert found["requests"] == 1
    assert found["device_s"] > 0
    assert (found["charged_usd"] > 0) is pays
    assert found["cost_usd"] > 0


def test_a_caller_who_leaves_pays_for_what_ran(paid: Paid) -> None:
    async def leave() -> None:
        work = asyncio.ensure_future(paid.engine.submit(attention(8192, heads=8, mode="chunked")))
        await until_started(paid.engine)
        await asyncio.sleep(0.02)
        work.cancel()
        while paid.engine.execution.device._loop.running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)

    run(leave())
    found = paid.requests()["cancelled"]
    assert found["device_s"] > 0.015
    assert found["charged_usd"] == found["cost_usd"] > 0


def test_what_still_runs_at_the_close_is_paid_and_written_down(paid: Paid) -> None:
    engine = paid.engine

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
    paid.is_closed = True
    found = {one["outcome"]: one for one in paid.bank.usage(0, 1e12, ("outcome",), None)["groups"]}
    assert found["cancelled"]["device_s"] > 0.015
    assert "lost" not in found
    assert all(holding.balance == 0 for holding in engine.meter.holdings())  # type: ignore[union-attr]


def test_a_bank_that_is_slow_costs_no_more_than_the_timeout(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> Any:
        time.sleep(0.3)
        raise LedgerError("slow")

    monkeypatch.setattr(paid.bank, "lease", slow)
    with pytest.raises(FarsightError, match="asking for the budget") as caught:
        run(paid.engine.submit(of("poor", attention(16, timeout_s=0.2))))
    assert caught.value.kind is Kind.DEADLINE
    assert paid.requests() == {}


def test_a_request_that_cannot_be_accounted_is_settled(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(paid.engine._settlement, "_answer", bug)
    with pytest.raises(FarsightError) as caught:
        run(paid.engine.submit(attention()))
    assert caught.value.kind is Kind.INTERNAL
    found = paid.requests()
    assert found["internal"]["charged_usd"] == 0 < found["internal"]["cost_usd"]


def test_a_bug_in_the_books_stops_nothing_else(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(paid.engine.meter, "_export", bug)
    run(paid.engine.submit(attention()))
    assert set(paid.requests()) == {"ok"}
    assert paid.metric("ledger_errors_total") >= 1


def test_a_journal_that_cannot_be_written_refuses_and_gives_the_money_back(
    paid: Paid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError("no space left on device")

    books = paid.engine.meter
    assert books is not None
    monkeypatch.setattr(books._journal, "accepted", full)
    with pytest.raises(FarsightError, match="ledger cannot be written") as caught:
        run(paid.engine.submit(of("poor", attention())))
    assert caught.value.kind is Kind.UNAVAILABLE
    monkeypatch.undo()
    held = books.holdings()[0].balance
    run(paid.engine.submit(of("poor", attention())))
    assert books.holdings()[0].balance < held


def test_config_of_prices() -> None:
    prices = Config(price_per_device_hour_usd={"cpu": 0.1, "NVIDIA": 2.0, "NVIDIA H100": 3.0, "cuda": 1.0})
    assert prices.hour_usd("cpu", "cpu") == 0.1
    assert prices.hour_usd("NVIDIA H100 80GB HBM3", "cuda") == 3.0
    assert prices.hour_usd("NVIDIA L4", "cuda") == 2.0
    assert prices.hour_usd("Other", "cuda") == 1.0
    with pytest.raises(ValueError, match="no price for tpu"):
        prices.hour_usd("tpu")
