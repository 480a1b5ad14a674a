"""Usage of one replica: a request is reserved and logged when it is accepted, charged and logged when it settles."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from service.billing.budget_leases import BudgetLease, BudgetLeases, Reservation
from service.billing.ledger import Ledger, LedgerError
from service.billing.row import OUTCOME_OK, OUTCOME_PRICED, CapacityRow, LedgerRow
from service.billing.tenants import Tenants
from service.billing.write_ahead_log import WriteAheadLog, recover
from service.config import Config, TenantConfig
from service.core.answer import Capacity, cost_usd
from service.core.host_work import HostUse
from service.core.plan import Plan
from service.errors import FarsightError, Kind
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import RequestRecord

logger = logging.getLogger("farsight")

TICK_S = 1.0
RECOVER_EVERY, CAPACITY_EVERY = 5, 5  # ticks
NOT_CHARGED = frozenset({Kind.INTERNAL, Kind.OUT_OF_MEMORY, Kind.UNAVAILABLE})  # failures of the service


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is reserved and logged, and must be settled."""

    number: int  # in the write-ahead log
    row: LedgerRow
    reservation: Reservation


class UsageMeter:
    """Meters the requests of one replica. `accept` and `settle` run on the event loop; a thread ships to the ledger."""

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        ledger: Ledger,
        metrics: Metrics,
        *,
        hour_usd: float,
        clock: Callable[[], float] = time.time,
        lease_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hour_usd`: price of a device hour. `clock`: seconds since 1970. `lease_clock`: seconds that never jump.

        Raises OSError if the write-ahead log cannot be created, unless the disk is full.
        """
        self._ledger, self._tenants, self._metrics = ledger, tenants, metrics
        self._hour_usd, self._clock = hour_usd, clock
        self._directory = config.write_ahead_dir
        self._log = WriteAheadLog(config.write_ahead_dir)
        self._leases = BudgetLeases(ledger, config.lease_share, lease_clock)
        self._recorded = self._exported = Capacity(0.0, 0.0)  # so far: in the log, and in the metrics
        self._host_usd = 0.0  # of host work that is not in the metrics yet
        self._capacity: Callable[[], Capacity] = lambda: Capacity(0.0, 0.0)
        self._ticks = 0
        self._shipping = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "ledger")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metering", daemon=True)

    def open(self, capacity: Callable[[], Capacity]) -> None:
        """Start the thread. `capacity` returns the device's used and idle seconds since the start."""
        self._capacity = capacity
        self._thread.start()

    def leases(self) -> list[BudgetLease]:
        return self._leases.snapshot()

    async def accept(self, tenant: TenantConfig, request_id: str, endpoint: str, model: str, plan: Plan) -> Accepted:
        """Reserve the predicted cost and log the request.

        Raises FarsightError: OVER_BUDGET, TOO_LARGE (more than a budget's capacity), UNAVAILABLE (ledger, disk).
        """
        reservation = await self._reserve(tenant, self._costs(plan))
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
            return Accepted(self._log.accepted(row), row, reservation)
        except OSError as error:
            self._leases.settle(reservation, {"usd": 0.0, "device_s": 0.0})
            self._failed("an accepted request cannot be logged", error)
            raise FarsightError(Kind.UNAVAILABLE, "the ledger cannot be written", retry_after_s=5.0) from error

    async def reserve_host(self, tenant: TenantConfig, usd: float) -> Reservation:
        """Reserve the predicted cost of host work. Raises FarsightError like `accept`."""
        return await self._reserve(tenant, {"usd": usd, "device_s": 0.0})

    def settle_host(self, reservation: Reservation, usd: float) -> None:
        """Charge what host work cost, however its request ends."""
        self._leases.settle(reservation, {"usd": usd, "device_s": 0.0})
        self._host_usd += usd

    def settle_unaccepted(
        self, record: RequestRecord, use: HostUse, model: str, failure: Kind | None, total_s: float
    ) -> None:
        """Log the host work of a request that the device never got: refused, or (no `failure`) only priced."""
        is_charged = failure not in NOT_CHARGED
        row = LedgerRow(
            at_s=self._clock(),
            request_id=record.received.id,
            tenant=use.tenant,
            endpoint=record.received.endpoint,
            model=model,
            plan="none",
            outcome=failure.value if failure else OUTCOME_PRICED,
            host_s=use.seconds,
            host_usd=use.usd,
            cost_usd=use.usd,
            charged_usd=use.usd if is_charged else 0.0,
            predicted_s=0.0,
            total_s=total_s,
        )
        if not is_charged:
            self._leases.refund(use.tenant, use.usd)
        try:
            self._log.unaccepted(row)
        except OSError as error:
            self._failed(f"host work cannot be logged: {row}", error)

    async def _reserve(self, tenant: TenantConfig, costs: Mapping[str, float]) -> Reservation:
        try:
            return await self._leases.reserve(tenant, costs)
        except FarsightError as error:
            if error.kind is Kind.OVER_BUDGET:
                self._metrics.budget_refused(self._tenants.label(tenant.name))
            raise
        except LedgerError as error:
            self._failed("the ledger is unavailable", error)
            raise _unchecked(tenant) from error

    def check(self, tenant: TenantConfig, plan: Plan) -> None:
        """Raise what `accept` would raise, as far as this replica knows without asking the ledger."""
        try:
            self._leases.check(tenant, self._costs(plan))
        except LedgerError as error:  # counted where requests are refused for it
            raise _unchecked(tenant) from error

    def _costs(self, plan: Plan) -> dict[str, float]:
        """Predicted cost by unit of a budget."""
        return {"usd": cost_usd(plan.predicted_s, self._hour_usd), "device_s": plan.predicted_s}

    def settle(self, accepted: Accepted, failure: Kind | None, used: Mapping[str, Any]) -> None:
        """Charge the budget and log the settled request.

        `used`: fields of its row that are known now, "cost_usd", "host_usd" and "device_s" among them. Its outcome and
        charge are set here: failures of the service are not charged.
        """
        charged = {"usd": used["cost_usd"], "device_s": used["device_s"]}
        if failure in NOT_CHARGED:
            charged = dict.fromkeys(charged, 0.0)
        outcome = failure.value if failure else OUTCOME_OK
        row = replace(accepted.row, **used, outcome=outcome, charged_usd=charged["usd"])
        # host work was charged when it was done
        self._leases.settle(accepted.reservation, charged | {"usd": charged["usd"] - row.host_usd})
        try:
            self._log.settled(accepted.number, row)
        except OSError as error:  # it ran and will be answered; this log line is its only trace
            self._failed(f"a settled request cannot be logged: {row}", error)

    async def usage(self, from_s: float, to_s: float, group_by: tuple[str, ...], tenant: str | None) -> dict[str, Any]:
        """`Ledger.usage` with all requests of this replica; those of other replicas may be a second late.

        Raises FarsightError (UNAVAILABLE).
        """

        def read() -> dict[str, Any]:
            self._record_capacity()
            self._ship()
            return self._ledger.usage(from_s, to_s, group_by, tenant)

        try:  # one thread: a caller that polls waits for its own queries
            return await asyncio.get_running_loop().run_in_executor(self._reader, read)
        except (LedgerError, OSError) as error:
            self._failed("usage cannot be read", error)
            raise FarsightError(Kind.UNAVAILABLE, "the ledger is unavailable", retry_after_s=2.0) from error

    def close(self) -> None:
        """Give leases back and ship what is left. Raises LedgerError or OSError."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with ExitStack() as rest:  # whatever fails, everything else is done
            rest.callback(self._log.close, self._ledger)
            rest.callback(self._leases.close)
            rest.callback(self._reader.shutdown)
            self._record_capacity()

    # -- on the meter's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Work of every second. Failures are logged and counted, and the next tick tries again."""
        self._ticks += 1
        steps = [self._tenants.refresh, self._export, self._ship, self._leases.rebalance]
        if self._ticks % CAPACITY_EVERY == 0:
            steps.insert(0, self._record_capacity)
        if self._ticks % RECOVER_EVERY == 1:
            steps.append(self._recover)
        for step in steps:  # a step that fails must not stop the next ones
            try:
                step()
            except (LedgerError, OSError) as error:
                self._failed("the ledger is behind; trying again in a second", error)
            except Exception as error:
                self._metrics.ledger_errors.inc()
                logger.error("bug in the usage meter", exc_info=error)

    def _recover(self) -> None:
        if lost := recover(self._directory, self._ledger):
            logger.warning("%d requests were lost with a dead replica; they are not charged", lost)

    def _export(self) -> None:
        now = self._capacity()
        used_s, idle_s = now.used_s - self._exported.used_s, now.idle_s - self._exported.idle_s
        joules = None if now.idle_j is None else max(0.0, now.idle_j - (self._exported.idle_j or 0.0))
        self._exported = now
        self._metrics.idle(max(0.0, idle_s), joules)  # rounding may make it negative
        host_usd, self._host_usd = self._host_usd, 0.0
        self._metrics.allocated(cost_usd(used_s + idle_s, self._hour_usd) + host_usd)
        for lease in self.leases():
            self._metrics.budget_used(self._tenants.label(lease.tenant), lease.budget.name, 1 - lease.level)
        self._metrics.ledger_pending.set(self._log.pending)
        self._metrics.report_memory()

    def _record_capacity(self) -> None:
        with self._shipping:
            now = self._capacity()
            used_s, idle_s = now.used_s - self._recorded.used_s, now.idle_s - self._recorded.idle_s
            usd = cost_usd(used_s + idle_s, self._hour_usd)
            self._log.capacity(CapacityRow(at_s=self._clock(), used_s=used_s, idle_s=idle_s, usd=usd))
            self._recorded = now

    def _ship(self) -> None:
        with self._shipping:
            self._log.ship(self._ledger)

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.ledger_errors.inc()
        logger.error("%s: %r", what, error)


def _unchecked(tenant: TenantConfig) -> FarsightError:
    message = f"the budget of tenant {tenant.name!r} cannot be checked now"
    return FarsightError(Kind.UNAVAILABLE, message, retry_after_s=2.0)
