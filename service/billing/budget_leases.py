"""What one replica may spend of its tenants' budgets without asking: leased slices, reserved, settled, given back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.billing.ledger import Ledger, LedgerError
from service.config import Budget, TenantConfig
from service.errors import FarsightError, Kind

QUIET_S = 30.0  # without a request of the tenant: its lease goes back
ASK_AGAIN_S = 2.0  # after the bank refused, or did not answer: others may have given something back
MOST_LEASES = 2  # that are held; what refunds add beyond goes back
LEVEL_EVERY = 10  # ticks between two looks at how full a budget is


@dataclass(slots=True)
class BudgetLease:
    """One budget of one tenant, as far as it is here. `balance` is leased and not reserved; negative after a request
    that took more than it was predicted to."""

    tenant: str
    budget: Budget
    balance: float = 0.0
    level: float = 1.0  # of the whole budget, when the bank was last asked
    used_at_s: float = 0.0
    refused: float = float("inf")  # the bank had less than so much,
    until_s: float = 0.0  # has it then by itself,
    ask_at_s: float = 0.0  # and may be asked again now


Reserved = tuple[tuple[BudgetLease, float], ...]


class BudgetLeases:
    """On the event loop, but for what asks the bank: that has a thread of its own, one question at a time."""

    def __init__(self, bank: Ledger, lease_share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bank, self._share, self._clock = bank, lease_share, clock
        self._holdings: dict[tuple[str, Budget], BudgetLease] = {}
        self._guard = threading.Lock()
        self._away_until_s = 0.0
        self._ticks = 0
        self._asker = ThreadPoolExecutor(1, "bank")

    def holdings(self) -> list[BudgetLease]:
        with self._guard:
            return list(self._holdings.values())

    async def reserve(self, tenant: TenantConfig, costs: Mapping[str, float]) -> Reserved:
        """Set `costs` (by unit: usd, device_s) aside in every budget of the tenant.

        Raises OVER_BUDGET with the seconds until the budget has refilled, TOO_LARGE where it never can, UNAVAILABLE
        where the bank does not answer. Asks the bank only where what is held does not do.
        """
        if not tenant.budgets:
            return ()
        while True:
            with self._guard:
                wanted = tuple((self._holding(tenant.name, budget), costs[budget.unit]) for budget in tenant.budgets)
                short = [(holding, amount) for holding, amount in wanted if holding.balance < amount]
                if not short:
                    for holding, amount in wanted:
                        holding.balance -= amount
                    return wanted
            for holding, amount in short:
                self._check(holding, amount)
                await asyncio.get_running_loop().run_in_executor(self._asker, self._ask, holding, amount)

    def check(self, tenant: TenantConfig, costs: Mapping[str, float]) -> None:
        """Raise what `reserve` would raise, as far as that is known without asking."""
        for budget in tenant.budgets:
            holding = self._holdings.get((tenant.name, budget)) or BudgetLease(tenant.name, budget)
            if holding.balance < costs[budget.unit]:
                self._check(holding, costs[budget.unit])

    def settle(self, reserved: Reserved, used: Mapping[str, float]) -> None:
        """Pay what was used instead of what was set aside."""
        with self._guard:
            for holding, amount in reserved:
                holding.balance += amount - used[holding.budget.unit]

    def tend(self) -> None:
        """Once a second or so, from any thread but the event loop's: have a lease where a tenant is busy, and none
        where it is not. Raises what the bank raises."""
        self._asker.submit(self._tend).result()

    def close(self) -> None:
        """Give everything back."""
        try:
            for holding in self.holdings():
                self._give_back(holding, holding.balance)
        finally:
            self._asker.shutdown()

    def _holding(self, tenant: str, budget: Budget) -> BudgetLease:
        holding = self._holdings.setdefault((tenant, budget), BudgetLease(tenant, budget))
        holding.used_at_s = self._clock()
        return holding

    def _check(self, holding: BudgetLease, amount: float) -> None:
        """Refuse without asking what cannot be granted yet, or ever."""
        budget = holding.budget
        if amount > budget.capacity:
            raise FarsightError(
                Kind.TOO_LARGE,
                f"predicted cost: {amount:.3g} {budget.unit} is over the {budget.capacity:g} {budget.unit} that budget "
                f"{budget.name} of tenant {holding.tenant!r} ever has at one time",
                code="over_budget",
            )
        now_s = self._clock()
        if now_s < self._away_until_s:
            raise LedgerError("the bank did not answer a moment ago")
        if now_s < holding.ask_at_s and amount - holding.balance >= holding.refused:
            raise self._refusal(holding, amount, max(0.0, holding.until_s - now_s))

    def _refusal(self, holding: BudgetLease, amount: float, refill_s: float) -> FarsightError:
        budget = holding.budget
        return FarsightError(
            Kind.OVER_BUDGET,
            f"budget {budget.name} of tenant {holding.tenant!r} ({budget.amount:g} {budget.unit} per {budget.per}) has "
            f"less left than the {amount:.3g} {budget.unit} that this request is predicted to cost",
            retry_after_s=refill_s,
        )

    # -- on the asker's thread ----------------------------------------------------------------------------------

    def _ask(self, holding: BudgetLease, amount: float) -> None:
        missing = amount - holding.balance
        if missing <= 0:  # an answer to somebody else brought enough
            return
        if self._clock() < self._away_until_s:
            raise LedgerError("the bank did not answer a moment ago")
        try:
            lease = self._bank.lease(
                holding.tenant, holding.budget, missing, missing + self._share * holding.budget.capacity
            )
        except LedgerError:
            self._away_until_s = self._clock() + ASK_AGAIN_S  # who waits behind this one need not wait as long
            raise
        with self._guard:
            holding.level = lease.level
            if not lease.granted:
                holding.refused, holding.until_s = missing, self._clock() + lease.refill_s
                holding.ask_at_s = self._clock() + min(lease.refill_s, ASK_AGAIN_S)
                raise self._refusal(holding, amount, lease.refill_s)
            holding.balance += lease.granted
            holding.refused = float("inf")

    def _tend(self) -> None:
        self._ticks += 1
        for holding in self.holdings():
            lease = self._share * holding.budget.capacity
            if self._clock() - holding.used_at_s > QUIET_S:
                self._give_back(holding, holding.balance)
            elif holding.balance > MOST_LEASES * lease:
                self._give_back(holding, holding.balance - lease)
            elif holding.balance < lease / 2:
                asked = lease - holding.balance
                # of what there is, as much as there is
                answer = self._bank.lease(holding.tenant, holding.budget, 0.0, asked)
                with self._guard:
                    holding.balance += answer.granted
                    holding.level = answer.level
            if holding.level < 1 and self._ticks % LEVEL_EVERY == 0:  # it refills, and others use it
                holding.level = self._bank.lease(holding.tenant, holding.budget, 0.0, 0.0).level

    def _give_back(self, holding: BudgetLease, amount: float) -> None:
        with self._guard:
            holding.balance -= amount
        if amount:
            try:
                self._bank.give_back(holding.tenant, holding.budget, amount)
            except BaseException:
                with self._guard:
                    holding.balance += amount
                raise
