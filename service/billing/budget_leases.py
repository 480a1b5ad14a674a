"""Budgets on one replica: parts leased from the ledger, so that most requests are reserved without asking it."""

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

IDLE_LEASE_S = 30.0  # without a request of the tenant, after which its lease is given back
RETRY_S = 2.0  # after a refusal or an error of the ledger: other replicas may have given something back
MAX_LEASES = 2  # held for one budget; refunds above that are given back
LEVEL_EVERY = 10  # ticks between refreshes of a budget's level


@dataclass(slots=True)
class BudgetLease:
    """What this replica holds of one budget of a tenant, in the budget's unit."""

    tenant: str
    budget: Budget
    balance: float = 0.0  # leased and not reserved; negative after requests that used more than predicted
    level: float = 1.0  # what was left of the whole budget at the last answer of the ledger, as a share of its capacity
    used_at_s: float = 0.0  # last request of the tenant
    refused_amount: float = float("inf")  # the ledger had less than this,
    refilled_at_s: float = 0.0  # will have it by this time,
    retry_at_s: float = 0.0  # and may be asked again from this time on


Reservation = tuple[tuple[BudgetLease, float], ...]


class BudgetLeases:
    """The leases of all tenants. Called on the event loop; calls to the ledger run one at a time on a thread."""

    def __init__(self, ledger: Ledger, lease_share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`lease_share`: size of a lease as a share of its budget's capacity."""
        self._ledger, self._share, self._clock = ledger, lease_share, clock
        self._leases: dict[tuple[str, Budget], BudgetLease] = {}
        self._guard = threading.Lock()
        self._unavailable_until_s = 0.0
        self._ticks = 0
        self._worker = ThreadPoolExecutor(1, "leases")

    def snapshot(self) -> list[BudgetLease]:
        with self._guard:
            return list(self._leases.values())

    async def reserve(self, tenant: TenantConfig, costs: Mapping[str, float]) -> Reservation:
        """Reserve `costs` (by unit: usd, device_s) in every budget of the tenant. Asks the ledger only if leases are
        too small.

        Raises FarsightError: OVER_BUDGET with the seconds to the refill, TOO_LARGE if the budget can never hold it.
        Raises LedgerError if the ledger is unavailable.
        """
        budgets = [budget for budget in tenant.budgets if costs[budget.unit] > 0]
        if not budgets:
            return ()
        while True:
            with self._guard:
                wanted = tuple((self._lease_of(tenant.name, budget), costs[budget.unit]) for budget in budgets)
                short = [(lease, amount) for lease, amount in wanted if lease.balance < amount]
                if not short:
                    for lease, amount in wanted:
                        lease.balance -= amount
                    return wanted
            for lease, amount in short:
                self._refuse_early(lease, amount)
                await asyncio.get_running_loop().run_in_executor(self._worker, self._extend, lease, amount)

    def check(self, tenant: TenantConfig, costs: Mapping[str, float]) -> None:
        """Raise what `reserve` would raise, as far as this replica knows without asking the ledger."""
        for budget in tenant.budgets:
            lease = self._leases.get((tenant.name, budget)) or BudgetLease(tenant.name, budget)
            if lease.balance < costs[budget.unit]:
                self._refuse_early(lease, costs[budget.unit])

    def settle(self, reservation: Reservation, used: Mapping[str, float]) -> None:
        """Charge what was used (by unit) instead of what was reserved."""
        with self._guard:
            for lease, amount in reservation:
                lease.balance += amount - used[lease.budget.unit]

    def refund(self, tenant: str, usd: float) -> None:
        """Return what was charged to budgets in USD."""
        with self._guard:
            for lease in self._leases.values():
                if lease.tenant == tenant and lease.budget.unit == "usd":
                    lease.balance += usd

    def rebalance(self) -> None:
        """Top up the leases of busy tenants, give back those of idle ones. Call about once a second, not on the loop.

        Raises LedgerError.
        """
        self._worker.submit(self._rebalance).result()

    def close(self) -> None:
        """Give all leases back. Raises LedgerError."""
        try:
            for lease in self.snapshot():
                self._give_back(lease, lease.balance)
        finally:
            self._worker.shutdown()

    def _lease_of(self, tenant: str, budget: Budget) -> BudgetLease:
        lease = self._leases.setdefault((tenant, budget), BudgetLease(tenant, budget))
        lease.used_at_s = self._clock()
        return lease

    def _refuse_early(self, lease: BudgetLease, amount: float) -> None:
        """Raise, without asking the ledger, if it cannot grant `amount` now or ever."""
        budget = lease.budget
        if amount > budget.capacity:
            raise FarsightError(
                Kind.TOO_LARGE,
                f"predicted cost: expected at most {budget.capacity:g} {budget.unit}, the capacity of budget "
                f"{budget.name} of tenant {lease.tenant!r}, got {amount:.3g} {budget.unit}",
                code="over_budget",
            )
        now_s = self._clock()
        if now_s < self._unavailable_until_s:
            raise LedgerError("the ledger was unavailable a moment ago")
        if now_s < lease.retry_at_s and amount - lease.balance >= lease.refused_amount:
            raise self._over_budget(lease, amount, max(0.0, lease.refilled_at_s - now_s))

    def _over_budget(self, lease: BudgetLease, amount: float, refill_s: float) -> FarsightError:
        budget = lease.budget
        return FarsightError(
            Kind.OVER_BUDGET,
            f"budget {budget.name} of tenant {lease.tenant!r} ({budget.amount:g} {budget.unit} per {budget.per}) has "
            f"less left than the {amount:.3g} {budget.unit} that this request is predicted to cost",
            retry_after_s=refill_s,
        )

    # -- on the worker thread -----------------------------------------------------------------------------------

    def _extend(self, lease: BudgetLease, amount: float) -> None:
        missing = amount - lease.balance
        if missing <= 0:  # extended for another request meanwhile
            return
        if self._clock() < self._unavailable_until_s:
            raise LedgerError("the ledger was unavailable a moment ago")
        try:
            most = missing + self._share * lease.budget.capacity
            grant = self._ledger.lease(lease.tenant, lease.budget, missing, most)
        except LedgerError:
            # requests queued behind this one fail at once instead of waiting for a timeout each
            self._unavailable_until_s = self._clock() + RETRY_S
            raise
        with self._guard:
            lease.level = grant.level
            if not grant.amount:
                lease.refused_amount, lease.refilled_at_s = missing, self._clock() + grant.refill_s
                lease.retry_at_s = self._clock() + min(grant.refill_s, RETRY_S)
                raise self._over_budget(lease, amount, grant.refill_s)
            lease.balance += grant.amount
            lease.refused_amount = float("inf")

    def _rebalance(self) -> None:
        self._ticks += 1
        for lease in self.snapshot():
            size = self._share * lease.budget.capacity
            if self._clock() - lease.used_at_s > IDLE_LEASE_S:
                self._give_back(lease, lease.balance)
            elif lease.balance > MAX_LEASES * size:
                self._give_back(lease, lease.balance - size)
            elif lease.balance < size / 2:
                # least 0: take what is left, even if it is less than a whole lease
                grant = self._ledger.lease(lease.tenant, lease.budget, 0.0, size - lease.balance)
                with self._guard:
                    lease.balance += grant.amount
                    lease.level = grant.level
            if lease.level < 1 and self._ticks % LEVEL_EVERY == 0:  # it refills, and other replicas use it
                lease.level = self._ledger.lease(lease.tenant, lease.budget, 0.0, 0.0).level

    def _give_back(self, lease: BudgetLease, amount: float) -> None:
        with self._guard:
            lease.balance -= amount
        if amount:
            try:
                self._ledger.give_back(lease.tenant, lease.budget, amount)
            except BaseException:
                with self._guard:
                    lease.balance += amount
                raise
