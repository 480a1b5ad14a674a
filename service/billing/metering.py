"""A replica's side of the money: a request is reserved and written down when it is accepted, settled when it ends."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from service.billing.budget_leases import BudgetLease, BudgetLeases, Reserved
from service.billing.ledger import Ledger, LedgerError
from service.billing.row import OUTCOME_OK, CapacityRow, LedgerRow
from service.billing.tenants import Tenants
from service.billing.write_ahead_log import WriteAheadLog, adopt
from service.config import Config, TenantConfig
from service.core.answer import Capacity, cost_usd
from service.core.plan import Plan
from service.errors import FarsightError, Kind
from service.telemetry.metrics import Metrics

logger = logging.getLogger("farsight")

TICK_S = 1.0
ADOPT_EVERY, CAPACITY_EVERY = 5, 5  # ticks
# failures that the caller does not pay for
OURS = frozenset({Kind.INTERNAL, Kind.OUT_OF_MEMORY, Kind.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that the ledger will hear of."""

    number: int
    row: LedgerRow
    reserved: Reserved


class UsageMeter:
    """Of one replica. `accept` and `settle` are called on the event loop; a thread talks to the bank."""

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        bank: Ledger,
        metrics: Metrics,
        *,
        hour_usd: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bank, self._tenants, self._metrics = bank, tenants, metrics
        self._hour_usd, self._clock = hour_usd, clock
        self._directory = config.journal_dir
        self._journal = WriteAheadLog(config.journal_dir)
        self._purse = BudgetLeases(bank, config.lease_share)
        self._told = self._exported = Capacity(0.0, 0.0)  # to the ledger, and as metrics
        self._capacity: Callable[[], Capacity] = lambda: Capacity(0.0, 0.0)
        self._ticks = 0
        self._shipping = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "ledger")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="books", daemon=True)

    def open(self, capacity: Callable[[], Capacity]) -> None:
        """Start the thread. `capacity` tells what the device has done so far."""
        self._capacity = capacity
        self._thread.start()

    def holdings(self) -> list[BudgetLease]:
        return self._purse.holdings()

    async def accept(self, tenant: TenantConfig, request_id: str, endpoint: str, model: str, plan: Plan) -> Accepted:
        """Reserve what it is predicted to cost, and write it down. Raises FarsightError where it may not run."""
        try:
            reserved = await self._purse.reserve(tenant, self._costs(plan))
        except FarsightError as error:
            if error.kind is Kind.OVER_BUDGET:
                self._metrics.budget_refused(tenant.name)
            raise
        except LedgerError as error:
            self._failed("the bank does not answer", error)
            message = f"the budget of tenant {tenant.name!r} cannot be asked for now"
            raise FarsightError(Kind.UNAVAILABLE, message, retry_after_s=2.0) from error
        row = LedgerRow(
            at_s=self._clock(),
            request_id=request_id,
            tenant=tenant.name,
            endpoint=endpoint,
            model=model,
            plan=plan.kind.value,
            predicted_s=plan.predicted_s,
        )
        try:
            return Accepted(self._journal.accepted(row), row, reserved)
        except OSError as error:
            self._purse.settle(reserved, {"usd": 0.0, "device_s": 0.0})
            self._failed("a request cannot be written down", error)
            raise FarsightError(Kind.UNAVAILABLE, "the ledger cannot be written", retry_after_s=5.0) from error

    def check(self, tenant: TenantConfig, plan: Plan) -> None:
        """Raise where it would be refused now, as far as this replica knows; asks nobody."""
        self._purse.check(tenant, self._costs(plan))

    def _costs(self, plan: Plan) -> dict[str, float]:
        """By unit of a budget."""
        return {"usd": cost_usd(plan.predicted_s, self._hour_usd), "device_s": plan.predicted_s}

    def settle(self, accepted: Accepted, failure: Kind | None, row: LedgerRow) -> None:
        """Charge the budget and log the settled request.

        `row` is `accepted.row` with what the request used; its outcome and charge are set here, and failures of the
        service are not charged.
        """
        charged = {"usd": 0.0, "device_s": 0.0} if failure in OURS else {"usd": row.cost_usd, "device_s": row.device_s}
        row = replace(row, outcome=failure.value if failure else OUTCOME_OK, charged_usd=charged["usd"])
        self._purse.settle(accepted.reserved, charged)
        try:
            self._journal.settled(accepted.number, row)
        except OSError as error:  # it is done and will be answered; this line is all that is left of it
            self._failed(f"a settled request cannot be written down: {row}", error)

    async def usage(self, from_s: float, to_s: float, group_by: tuple[str, ...], tenant: str | None) -> dict[str, Any]:
        """What the ledger knows, of this replica to this moment and of others to a second or so before.

        Raises FarsightError (UNAVAILABLE).
        """

        def ask() -> dict[str, Any]:
            self._tell_capacity()
            self._journal_to_bank()
            return self._bank.usage(from_s, to_s, group_by, tenant)

        try:  # one at a time: who asks in a loop waits for himself
            return await asyncio.get_running_loop().run_in_executor(self._reader, ask)
        except LedgerError as error:
            raise FarsightError(Kind.UNAVAILABLE, "the ledger does not answer", retry_after_s=2.0) from error

    def close(self) -> None:
        """Give leases back and ship what is left; raises what the bank raises."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._tell_capacity()
        self._reader.shutdown()
        self._purse.close()
        self._journal.close(self._bank)

    # -- on the books' thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Every second; what fails is told and tried again."""
        self._ticks += 1
        work = [self._tenants.refresh, self._export, self._journal_to_bank, self._purse.tend]
        if self._ticks % CAPACITY_EVERY == 0:
            work.insert(0, self._tell_capacity)
        if self._ticks % ADOPT_EVERY == 1:
            work.append(self._adopt)
        for one in work:  # none keeps the next from its turn
            try:
                one()
            except (LedgerError, OSError) as error:
                self._failed("the ledger is behind, and is tried again", error)
            except Exception as error:
                self._metrics.ledger_errors.inc()
                logger.error("a bug in the books", exc_info=error)

    def _adopt(self) -> None:
        if lost := adopt(self._directory, self._bank):
            logger.warning("%d requests were lost with a replica that died; nobody pays for them", lost)

    def _export(self) -> None:
        now = self._capacity()
        used_s, idle_s = now.used_s - self._exported.used_s, now.idle_s - self._exported.idle_s
        joules = None if now.idle_j is None else max(0.0, now.idle_j - (self._exported.idle_j or 0.0))
        self._exported = now
        self._metrics.idle(max(0.0, idle_s), joules)  # not less than nothing: rounding
        self._metrics.allocated(cost_usd(used_s + idle_s, self._hour_usd))
        for holding in self._purse.holdings():
            self._metrics.budget_used(holding.tenant, holding.budget.name, 1 - holding.level)
        self._metrics.ledger_pending.set(self._journal.pending)
        self._metrics.report_memory()

    def _tell_capacity(self) -> None:
        with self._shipping:
            now = self._capacity()
            used_s, idle_s = now.used_s - self._told.used_s, now.idle_s - self._told.idle_s
            usd = cost_usd(used_s + idle_s, self._hour_usd)
            self._journal.capacity(CapacityRow(at_s=self._clock(), used_s=used_s, idle_s=idle_s, usd=usd))
            self._told = now

    def _journal_to_bank(self) -> None:
        with self._shipping:
            self._journal.ship(self._bank)

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.ledger_errors.inc()
        logger.error("%s: %r", what, error)
