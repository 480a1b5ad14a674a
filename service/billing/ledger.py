"""The ledger of the whole service: leases parts of budgets to replicas and records requests in a database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from service.billing import tables
from service.billing.database import Database, FileLost, is_disk_full
from service.config import Budget
from service.disk import is_full

ROLL_UP_EVERY_S = 3600.0
LEVEL_TOLERANCE = 1e-9  # rounding of a budget's level


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """Answer to a replica that asked for a lease. Amounts are in the budget's unit (usd or device_s)."""

    amount: float  # 0: refused
    refill_s: float  # until a refused lease can be granted; 0 if granted
    level: float  # what is left of the budget, as a share of its capacity


class LedgerError(Exception):
    """The ledger or its database is unavailable."""


class LedgerFull(LedgerError):
    """The disk of the ledger has no room; there may be some later."""


class RowsRefused(LedgerError):
    """The database rejects one of these rows, however often it is sent."""


class Ledger(Protocol):
    """What replicas use: a `LocalLedger`, or a client of the actor that holds one. Any call may raise LedgerError."""

    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant: ...

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None: ...

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None: ...

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]: ...


class LocalLedger:
    """The ledger on its database. A grant is committed before it is returned, so a crash never leases money twice.

    Calls of `lease` and `give_back` must not overlap; `record` and `usage` may run at the same time as any other call.
    """

    def __init__(self, url: str, keep_days: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._database = Database(url)  # opened by the first call: it may be unavailable at start
        self._losses = 0  # of the database's file, as reported to callers
        # of budgets, and the times for which they hold: a new file gets these
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}
        self._keep_s = keep_days * 86400
        self._rolled_up_s = clock()

    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant:
        """Grant between `least` and `most` (>= least) of a tenant's budget, or nothing and the seconds to its refill.

        Raises LedgerError.
        """
        now_s = self._clock()
        with self._transaction() as connection:
            level, at_s = self._level(connection, tenant, budget, now_s)
            amount = min(level, most) if level >= least - LEVEL_TOLERANCE else 0.0
            self._set_level(connection, tenant, budget, level - amount, at_s)
        self._levels[tenant, budget.name] = level - amount, at_s
        missing = 0.0 if amount or least <= 0 else least - level
        refill_s = missing * budget.period_s / budget.amount
        return LeaseGrant(amount, refill_s, (level - amount) / budget.capacity)

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        """Return what a replica leased and did not spend; negative: what it spent beyond its lease.

        Raises LedgerError.
        """
        now_s = self._clock()
        with self._transaction() as connection:
            level, at_s = self._level(connection, tenant, budget, now_s)
            level = min(budget.capacity, level + amount)
            self._set_level(connection, tenant, budget, level, at_s)
        self._levels[tenant, budget.name] = level, at_s

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows of a write-ahead log; rows that were recorded before are skipped.

        Raises LedgerError; RowsRefused if the database rejects a row, and then none of them is recorded. Once after the
        database's file was lost, so that callers count it; their next call skips these rows.
        """
        with self._transaction() as connection:
            tables.add_new(connection, tables.requests, requests)
            tables.add_new(connection, tables.capacity, capacity)
        now_s = self._clock()
        if now_s - self._rolled_up_s > ROLL_UP_EVERY_S:
            self._rolled_up_s = now_s
            with self._transaction(is_rolling_up=True) as connection:
                tables.roll_up(connection, now_s - self._keep_s)
        if self._database.losses > self._losses:
            self._losses = self._database.losses
            raise LedgerError("the ledger's file was deleted or replaced; what only the old file had is lost")

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        """{"groups": sums by `group_by`, "capacity": sums of all devices}; groups of one tenant, or of all (None).

        Raises LedgerError.
        """
        with self._transaction(is_read_only=True) as connection:
            groups = tables.usage(connection, from_s, to_s, group_by, tenant)
            return {"groups": groups, "capacity": tables.capacity_sums(connection, from_s, to_s)}

    def sample_requests(self, from_s: float, to_s: float, limit: int) -> list[dict[str, Any]]:
        """See `tables.sample_requests`. Raises LedgerError."""
        with self._transaction(is_read_only=True) as connection:
            return tables.sample_requests(connection, from_s, to_s, limit)

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def _transaction(self, *, is_read_only: bool = False, is_rolling_up: bool = False) -> Iterator[sa.Connection]:
        # the rows deleted must be the rows summed; if two roll up at once, one fails and retries in an hour
        level = "REPEATABLE READ" if is_rolling_up else None
        try:
            with self._database.begin(is_read_only=is_read_only, isolation_level=level) as connection:
                yield connection
        except (sa.exc.IntegrityError, sa.exc.DataError) as error:
            raise RowsRefused(f"{type(error).__name__}: {error.orig}") from None
        except OSError as error:
            kind = LedgerFull if is_full(error) else LedgerError
            raise kind(f"the ledger cannot be opened: {error}") from None
        except FileLost as error:
            raise LedgerError(str(error)) from None
        except sa.exc.SQLAlchemyError as error:
            kind = LedgerFull if is_disk_full(error) else LedgerError
            # without the statement's parameters: tenants' data must not reach the log
            raise kind(f"{type(error).__name__}: {getattr(error, 'orig', error)}") from None

    def _level(self, connection: sa.Connection, tenant: str, budget: Budget, now_s: float) -> tuple[float, float]:
        """Level of a budget after its refill, and the time for which it holds; a new budget is full.

        In a new file it is as it was in the one that was lost.

        That time never decreases, even if clocks do: no refill is counted twice.
        """
        table = tables.budgets
        level, at_s = self._levels.get((tenant, budget.name), (budget.capacity, now_s))
        tables.add_new(connection, table, [{"tenant": tenant, "budget": budget.name, "level": level, "at_s": at_s}])
        query = sa.select(table.c.level, table.c.at_s).where(table.c.tenant == tenant, table.c.budget == budget.name)
        found = connection.execute(query.with_for_update()).one()
        at_s = max(now_s, float(found.at_s))
        level = float(found.level) + (at_s - float(found.at_s)) * budget.amount / budget.period_s
        return min(budget.capacity, level), at_s

    def _set_level(self, connection: sa.Connection, tenant: str, budget: Budget, level: float, at_s: float) -> None:
        table = tables.budgets
        same = sa.and_(table.c.tenant == tenant, table.c.budget == budget.name)
        connection.execute(table.update().where(same).values(level=level, at_s=at_s))
