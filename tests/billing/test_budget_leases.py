"""Budgets across replicas: never overspent, few calls to the ledger, refusals with the time of the refill."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from service.billing.budget_leases import (
    IDLE_LEASE_S,
    LEVEL_EVERY,
    RETRY_S,
    BudgetLeases,
)
from service.billing.ledger import LeaseGrant, LedgerError, LocalLedger
from service.config import Budget, TenantConfig
from service.errors import FarsightError, Kind
from tests.billing.common import Clock, ledger_at

MINUTE = Budget(device_s=60, per="minute")
TENANT = TenantConfig(name="a", budgets=(MINUTE,))


class Counting:
    """A ledger that counts calls of `lease` and can be unavailable."""

    def __init__(self, ledger: LocalLedger) -> None:
        self.ledger, self.asked, self.is_unavailable = ledger, 0, False

    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant:
        self.asked += 1
        if self.is_unavailable:
            raise LedgerError("unavailable")
        return self.ledger.lease(tenant, budget, least, most)

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        if self.is_unavailable:
            raise LedgerError("unavailable")
        self.ledger.give_back(tenant, budget, amount)


def cost(device_s: float) -> dict[str, float]:
    return {"device_s": device_s, "usd": device_s / 3600}


def spend(leases: BudgetLeases, predicted_s: float, used_s: float | None = None, tenant: TenantConfig = TENANT) -> None:
    async def request() -> None:
        reservation = await leases.reserve(tenant, cost(predicted_s))
        leases.settle(reservation, cost(predicted_s if used_s is None else used_s))

    asyncio.run(request())


def refused(leases: BudgetLeases, predicted_s: float) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        spend(leases, predicted_s)
    return caught.value


def test_most_requests_do_not_ask_the_ledger(tmp_path: Path) -> None:
    ledger = Counting(ledger_at(tmp_path, clock := Clock()))
    leases = BudgetLeases(ledger, 0.1, clock)
    for _ in range(100):
        spend(leases, 0.1)
    assert ledger.asked == 2  # leases of 6 s
    spend(leases, 0.1, tenant=TenantConfig(name="free"))
    assert ledger.asked == 2


def test_a_refusal_says_when_the_budget_has_refilled(tmp_path: Path) -> None:
    clock = Clock()
    leases = BudgetLeases(Counting(ledger_at(tmp_path, clock)), 0.1, clock)
    spend(leases, 58)
    error = refused(leases, 12)
    assert error.kind is Kind.OVER_BUDGET
    assert error.retry_after_s == pytest.approx(10)
    assert "12 device_s" in error.message
    clock.now_s += 9.9
    assert refused(leases, 12).retry_after_s == pytest.approx(0.1)
    clock.now_s += 0.2
    spend(leases, 12)


def test_refusals_do_not_ask_again_and_do_not_block_smaller_requests(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Counting(ledger_at(tmp_path, clock))
    leases = BudgetLeases(ledger, 0.02, clock)
    spend(leases, 50)
    refused(leases, 30)
    asked = ledger.asked
    for _ in range(10):
        refused(leases, 31)
    assert ledger.asked == asked
    spend(leases, 5)


def test_a_request_over_the_capacity_is_refused_without_asking(tmp_path: Path) -> None:
    ledger = Counting(ledger_at(tmp_path, clock := Clock()))
    error = refused(BudgetLeases(ledger, 0.1, clock), 61)
    assert error.kind is Kind.TOO_LARGE
    assert "60 device_s" in error.message
    assert ledger.asked == 0


def test_used_amounts_are_charged_not_predicted_ones(tmp_path: Path) -> None:
    clock = Clock()
    leases = BudgetLeases(Counting(ledger_at(tmp_path, clock)), 0.1, clock)
    for _ in range(50):
        spend(leases, 30, used_s=0.5)  # 25 in all
    spend(leases, 10, used_s=40)  # more than is left: a debt
    error = refused(leases, 10)
    assert error.retry_after_s == pytest.approx(15)
    clock.now_s += 15
    spend(leases, 10)


def test_all_budgets_of_a_tenant_apply(tmp_path: Path) -> None:
    clock = Clock()
    leases = BudgetLeases(Counting(ledger_at(tmp_path, clock)), 0.1, clock)
    both = TenantConfig(name="b", budgets=(Budget(device_s=600, per="minute"), Budget(usd=0.01, per="day")))
    spend(leases, 30, tenant=both)  # 0.0083 USD
    with pytest.raises(FarsightError, match="usd/day"):
        spend(leases, 30, tenant=both)
    # the lease of one budget for a request that the other refused is kept for the next request
    assert sum(lease.balance for lease in leases.snapshot() if lease.budget.unit == "device_s") <= 600 - 30


def test_leases_of_idle_tenants_are_given_back(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Counting(ledger_at(tmp_path, clock))
    leases = BudgetLeases(ledger, 0.5, clock)
    spend(leases, 1)
    leases.rebalance()
    assert leases.snapshot()[0].balance == pytest.approx(30)
    clock.now_s += IDLE_LEASE_S + 60
    leases.rebalance()
    assert leases.snapshot()[0].balance == 0
    assert ledger.lease("a", MINUTE, 60, 60).amount == 60


def test_refunds_of_other_replicas_are_seen_soon(tmp_path: Path) -> None:
    """A refusal does not last for the hours of the refill: another replica may give something back."""
    clock = Clock()
    ledger, day = (
        Counting(ledger_at(tmp_path, clock)),
        TenantConfig(name="a", budgets=(Budget(device_s=100, per="day"),)),
    )
    first, second = BudgetLeases(ledger, 0.02, clock), BudgetLeases(ledger, 0.02, clock)
    reservation = asyncio.run(first.reserve(day, cost(70)))
    with pytest.raises(FarsightError) as caught:
        spend(second, 50, tenant=day)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 10_000
    first.settle(reservation, cost(0))
    first.rebalance()  # gives the refund back
    clock.now_s += RETRY_S
    spend(second, 50, tenant=day)


def test_the_level_of_an_unused_budget_is_refreshed(tmp_path: Path) -> None:
    clock = Clock()
    leases = BudgetLeases(Counting(ledger_at(tmp_path, clock)), 0.02, clock)
    spend(leases, 57)
    assert leases.snapshot()[0].level < 0.1
    clock.now_s += 200
    for _ in range(LEVEL_EVERY):
        leases.rebalance()
    assert leases.snapshot()[0].level == 1


def test_requests_queued_behind_an_unavailable_ledger_fail_at_once(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Counting(ledger_at(tmp_path, clock))
    leases = BudgetLeases(ledger, 0.02, clock)
    ledger.is_unavailable = True

    async def many() -> list[object]:
        return await asyncio.gather(*(leases.reserve(TENANT, cost(1)) for _ in range(20)), return_exceptions=True)

    assert all(isinstance(result, LedgerError) for result in asyncio.run(many()))
    assert ledger.asked == 1
    ledger.is_unavailable = False
    clock.now_s += RETRY_S
    spend(leases, 1)


def test_an_unavailable_ledger_blocks_only_requests_beyond_the_lease(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Counting(ledger_at(tmp_path, clock))
    leases = BudgetLeases(ledger, 0.5, clock)
    spend(leases, 1)
    ledger.is_unavailable = True
    for _ in range(20):
        spend(leases, 1)
    with pytest.raises(LedgerError):
        spend(leases, 20)
    ledger.is_unavailable = False
    leases.rebalance()
    clock.now_s += RETRY_S
    spend(leases, 20)


def test_four_replicas_never_overspend(tmp_path: Path) -> None:
    """With bursts on each, predictions wrong by up to half, and a ledger that crashes in between."""
    clock, draw = Clock(), random.Random(7)
    ledgers = [Counting(ledger_at(tmp_path, clock)) for _ in range(4)]
    replicas = [BudgetLeases(ledger, 0.05, clock) for ledger in ledgers]
    spent_s, answered, begin_s = 0.0, 0, clock.now_s

    async def request(leases: BudgetLeases) -> float:
        predicted_s = draw.uniform(0.05, 0.5)
        try:
            reservation = await leases.reserve(TENANT, cost(predicted_s))
        except (FarsightError, LedgerError):
            return 0.0
        used_s = predicted_s * draw.uniform(0.5, 1.5)
        await asyncio.sleep(0)
        leases.settle(reservation, cost(used_s))
        return used_s

    async def burst() -> list[float]:
        return await asyncio.gather(*(request(draw.choice(replicas)) for _ in range(40)))

    for step in range(60):
        is_down = 20 <= step < 25
        for ledger in ledgers:
            ledger.is_unavailable = is_down
            if step == 25:  # a new ledger on the same database
                ledger.ledger = ledger_at(tmp_path, clock)
        used = asyncio.run(burst())
        spent_s += sum(used)
        answered += sum(used_s > 0 for used_s in used)
        clock.now_s += 2
        flowed_s = 60 + (clock.now_s - begin_s)
        assert spent_s <= flowed_s + 4 * 0.05 * 60  # at most one lease for each replica beyond it
    assert spent_s > 0.9 * (60 + 120)  # and nearly all of it is spent
    assert answered < 60 * 40
