"""Budgets across replicas: no more is spent than there is, asked for rarely, refused with the time of the refill."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from service.billing.budget_leases import (
    ASK_AGAIN_S,
    LEVEL_EVERY,
    QUIET_S,
    BudgetLeases,
)
from service.billing.ledger import Lease, LedgerError, LocalLedger
from service.config import Budget, TenantConfig
from service.errors import FarsightError, Kind
from tests.billing.common import Clock, bank_at

MINUTE = Budget(device_s=60, per="minute")
TENANT = TenantConfig(name="a", budgets=(MINUTE,))


class Counting:
    """A bank that counts what it is asked, and can be away."""

    def __init__(self, bank: LocalLedger) -> None:
        self.bank, self.asked, self.is_away = bank, 0, False

    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        self.asked += 1
        if self.is_away:
            raise LedgerError("away")
        return self.bank.lease(tenant, budget, least, wanted)

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        if self.is_away:
            raise LedgerError("away")
        self.bank.give_back(tenant, budget, amount)


def cost(device_s: float) -> dict[str, float]:
    return {"device_s": device_s, "usd": device_s / 3600}


def spend(purse: BudgetLeases, predicted_s: float, used_s: float | None = None, tenant: TenantConfig = TENANT) -> None:
    async def one() -> None:
        reserved = await purse.reserve(tenant, cost(predicted_s))
        purse.settle(reserved, cost(predicted_s if used_s is None else used_s))

    asyncio.run(one())


def refused(purse: BudgetLeases, predicted_s: float) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        spend(purse, predicted_s)
    return caught.value


def test_most_requests_ask_nobody(tmp_path: Path) -> None:
    bank = Counting(bank_at(tmp_path, clock := Clock()))
    purse = BudgetLeases(bank, 0.1, clock)
    for _ in range(100):
        spend(purse, 0.1)
    assert bank.asked == 2  # leases of 6 s
    spend(purse, 0.1, tenant=TenantConfig(name="free"))
    assert bank.asked == 2


def test_a_refusal_says_when_the_budget_has_refilled(tmp_path: Path) -> None:
    clock = Clock()
    purse = BudgetLeases(Counting(bank_at(tmp_path, clock)), 0.1, clock)
    spend(purse, 58)
    error = refused(purse, 12)
    assert error.kind is Kind.OVER_BUDGET
    assert error.retry_after_s == pytest.approx(10)
    assert "12 device_s" in error.message
    clock.now_s += 9.9
    assert refused(purse, 12).retry_after_s == pytest.approx(0.1)
    clock.now_s += 0.2
    spend(purse, 12)


def test_refusals_do_not_ask_again_and_do_not_stop_smaller_requests(tmp_path: Path) -> None:
    clock = Clock()
    bank = Counting(bank_at(tmp_path, clock))
    purse = BudgetLeases(bank, 0.02, clock)
    spend(purse, 50)
    refused(purse, 30)
    asked = bank.asked
    for _ in range(10):
        refused(purse, 31)
    assert bank.asked == asked
    spend(purse, 5)


def test_what_can_never_fit_is_told_at_once(tmp_path: Path) -> None:
    bank = Counting(bank_at(tmp_path, clock := Clock()))
    error = refused(BudgetLeases(bank, 0.1, clock), 61)
    assert error.kind is Kind.TOO_LARGE
    assert "60 device_s" in error.message
    assert bank.asked == 0


def test_what_was_used_is_paid_not_what_was_predicted(tmp_path: Path) -> None:
    clock = Clock()
    purse = BudgetLeases(Counting(bank_at(tmp_path, clock)), 0.1, clock)
    for _ in range(50):
        spend(purse, 30, used_s=0.5)  # 25 in all
    spend(purse, 10, used_s=40)  # more than there is: a debt
    error = refused(purse, 10)
    assert error.retry_after_s == pytest.approx(15)
    clock.now_s += 15
    spend(purse, 10)


def test_all_budgets_of_a_tenant_hold(tmp_path: Path) -> None:
    clock = Clock()
    purse = BudgetLeases(Counting(bank_at(tmp_path, clock)), 0.1, clock)
    both = TenantConfig(name="b", budgets=(Budget(device_s=600, per="minute"), Budget(usd=0.01, per="day")))
    spend(purse, 30, tenant=both)  # 0.0083 USD
    with pytest.raises(FarsightError, match="usd/day"):
        spend(purse, 30, tenant=both)
    # what was asked of one budget for a request that the other refused is held for the next
    assert sum(h.balance for h in purse.holdings() if h.budget.unit == "device_s") <= 600 - 30


def test_quiet_tenants_hold_nothing(tmp_path: Path) -> None:
    clock = Clock()
    bank = Counting(bank_at(tmp_path, clock))
    purse = BudgetLeases(bank, 0.5, clock)
    spend(purse, 1)
    purse.tend()
    assert purse.holdings()[0].balance == pytest.approx(30)
    clock.now_s += QUIET_S + 60
    purse.tend()
    assert purse.holdings()[0].balance == 0
    assert bank.lease("a", MINUTE, 60, 60).granted == 60


def test_what_comes_back_elsewhere_is_seen_soon(tmp_path: Path) -> None:
    """A refusal is not kept for the hours that the refill would take: another replica may give back."""
    clock = Clock()
    bank, day = Counting(bank_at(tmp_path, clock)), TenantConfig(name="a", budgets=(Budget(device_s=100, per="day"),))
    first, second = BudgetLeases(bank, 0.02, clock), BudgetLeases(bank, 0.02, clock)
    reserved = asyncio.run(first.reserve(day, cost(70)))
    with pytest.raises(FarsightError) as caught:
        spend(second, 50, tenant=day)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 10_000
    first.settle(reserved, cost(0))
    first.tend()  # refunds do not stay
    clock.now_s += ASK_AGAIN_S
    spend(second, 50, tenant=day)


def test_the_level_of_a_budget_that_nobody_uses_is_looked_at(tmp_path: Path) -> None:
    clock = Clock()
    purse = BudgetLeases(Counting(bank_at(tmp_path, clock)), 0.02, clock)
    spend(purse, 57)
    assert purse.holdings()[0].level < 0.1
    clock.now_s += 200
    for _ in range(LEVEL_EVERY):
        purse.tend()
    assert purse.holdings()[0].level == 1


def test_who_waits_behind_a_bank_that_is_away_need_not_wait_as_long(tmp_path: Path) -> None:
    clock = Clock()
    bank = Counting(bank_at(tmp_path, clock))
    purse = BudgetLeases(bank, 0.02, clock)
    bank.is_away = True

    async def many() -> list[object]:
        return await asyncio.gather(*(purse.reserve(TENANT, cost(1)) for _ in range(20)), return_exceptions=True)

    assert all(isinstance(one, LedgerError) for one in asyncio.run(many()))
    assert bank.asked == 1
    bank.is_away = False
    clock.now_s += ASK_AGAIN_S
    spend(purse, 1)


def test_a_bank_that_is_away_stops_only_what_is_beyond_the_lease(tmp_path: Path) -> None:
    clock = Clock()
    bank = Counting(bank_at(tmp_path, clock))
    purse = BudgetLeases(bank, 0.5, clock)
    spend(purse, 1)
    bank.is_away = True
    for _ in range(20):
        spend(purse, 1)
    with pytest.raises(LedgerError):
        spend(purse, 20)
    bank.is_away = False
    purse.tend()
    clock.now_s += ASK_AGAIN_S
    spend(purse, 20)


def test_four_replicas_never_spend_more_than_there_is(tmp_path: Path) -> None:
    """With bursts on each, predictions that are wrong by half, and a bank that dies in between."""
    clock, draw = Clock(), random.Random(7)
    banks = [Counting(bank_at(tmp_path, clock)) for _ in range(4)]
    purses = [BudgetLeases(bank, 0.05, clock) for bank in banks]
    spent_s, answered, asked_from_s = 0.0, 0, clock.now_s

    async def one(purse: BudgetLeases) -> float:
        predicted_s = draw.uniform(0.05, 0.5)
        try:
            reserved = await purse.reserve(TENANT, cost(predicted_s))
        except (FarsightError, LedgerError):
            return 0.0
        used_s = predicted_s * draw.uniform(0.5, 1.5)
        await asyncio.sleep(0)
        purse.settle(reserved, cost(used_s))
        return used_s

    async def burst() -> list[float]:
        return await asyncio.gather(*(one(draw.choice(purses)) for _ in range(40)))

    for step in range(60):
        away = 20 <= step < 25
        for bank in banks:
            bank.is_away = away
            if step == 25:  # the bank is a new one, with what the old one wrote
                bank.bank = bank_at(tmp_path, clock)
        used = asyncio.run(burst())
        spent_s += sum(used)
        answered += sum(one > 0 for one in used)
        clock.now_s += 2
        flowed_s = 60 + (clock.now_s - asked_from_s)
        assert spent_s <= flowed_s + 4 * 0.05 * 60  # no more than a lease each beyond it
    assert spent_s > 0.9 * (60 + 120)  # and nearly all of it could be spent
    assert answered < 60 * 40
