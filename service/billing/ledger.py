"""One bank for the whole service: it leases slices of budgets to replicas, and keeps the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa

from service.billing import tables as store
from service.config import Budget

FOLD_EVERY_S = 3600.0
SETTLE_S = 1e-9  # of a level: what floating point leaves over


@dataclass(frozen=True, slots=True)
class Lease:
    """What a replica got, when there is enough for what it asked (0: it got it), and how full the budget is."""

    granted: float
    refill_s: float
    level: float


class LedgerError(Exception):
    """The bank, or its database, does not answer now."""


class RowsRefused(LedgerError):
    """The database will never take one of these rows."""


class Ledger(Protocol):
    """What replicas ask: of `LocalLedger`, or of the actor that holds one. Any call may raise LedgerError."""

    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease: ...

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None: ...

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None: ...

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]: ...


class LocalLedger:
    """The bank itself. Every grant is in the database before it is told, so a bank that dies has spent nothing twice.

    Who calls `lease` and `give_back` takes turns; `record` and `usage` may run beside them.
    """

    def __init__(self, url: str, keep_days: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        self._url, self._clock = url, clock
        self._opening = threading.Lock()
        self._database: sa.Engine | None = None  # opened when it is first asked: it may be away when we start
        self._keep_s = keep_days * 86400
        self._folded_s = clock()

    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        """At least `least` of a tenant's budget and at most `wanted` (>= least), or nothing and when to come back."""
        now_s = self._clock()
        with self._transaction() as connection:
            level, at_s = self._level(connection, tenant, budget, now_s)
            granted = min(level, wanted) if level >= least - SETTLE_S else 0.0
            self._set_level(connection, tenant, budget, level - granted, at_s)
        missing = 0.0 if granted or least <= 0 else least - level
        refill_s = missing * budget.period_s / budget.amount
        return Lease(granted, refill_s, (level - granted) / budget.capacity)

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        """What a replica leased and did not spend; negative: what it spent beyond its lease."""
        now_s = self._clock()
        with self._transaction() as connection:
            level, at_s = self._level(connection, tenant, budget, now_s)
            self._set_level(connection, tenant, budget, min(budget.capacity, level + amount), at_s)

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        """Rows of a journal; those that are there already change nothing."""
        with self._transaction() as connection:
            store.add_new(connection, store.requests, requests)
            store.add_new(connection, store.capacity, capacity)
        now_s = self._clock()
        if now_s - self._folded_s > FOLD_EVERY_S:
            self._folded_s = now_s
            with self._transaction(is_folding=True) as connection:
                store.fold(connection, now_s - self._keep_s)

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        """{"groups": sums by `group_by`, "capacity": of all devices}; of one tenant, or of all."""
        with self._transaction(is_reading=True) as connection:
            groups = store.usage(connection, from_s, to_s, group_by, tenant)
            return {"groups": groups, "capacity": store.capacity_of(connection, from_s, to_s)}

    def singles(self, from_s: float, to_s: float, most: int) -> list[dict[str, Any]]:
        """See `store.singles`."""
        with self._transaction(is_reading=True) as connection:
            return store.singles(connection, from_s, to_s, most)

    def close(self) -> None:
        if self._database is not None:
            self._database.dispose()

    def _open(self) -> sa.Engine:
        with self._opening:
            if self._database is None:
                self._database = store.connect(self._url)
            return self._database

    @contextmanager
    def _transaction(self, *, is_reading: bool = False, is_folding: bool = False) -> Iterator[sa.Connection]:
        try:
            engine = self._open().execution_options(**{store.READING: is_reading})
            if is_folding and engine.dialect.name == "postgresql":
                # what is deleted is what was summed; of two that fold at once one fails, and tries again in an hour
                engine = engine.execution_options(isolation_level="REPEATABLE READ")
            with engine.begin() as connection:
                yield connection
        except (sa.exc.IntegrityError, sa.exc.DataError) as error:
            raise RowsRefused(f"{type(error).__name__}: {error.orig}") from None
        except OSError as error:
            raise LedgerError(f"the ledger cannot be opened: {error}") from None
        except sa.exc.SQLAlchemyError as error:
            # without its parameters: a row is nobody's business in a log
            raise LedgerError(f"{type(error).__name__}: {getattr(error, 'orig', error)}") from None

    def _level(self, connection: sa.Connection, tenant: str, budget: Budget, now_s: float) -> tuple[float, float]:
        """What was left and what flowed in since, and the time that this holds for: never before one that was told,
        whatever clocks do. A budget that nobody has touched is full."""
        table = store.budgets
        full = {"tenant": tenant, "budget": budget.name, "level": budget.capacity, "at_s": now_s}
        store.add_new(connection, table, [full])
        query = sa.select(table.c.level, table.c.at_s).where(table.c.tenant == tenant, table.c.budget == budget.name)
        found = connection.execute(query.with_for_update()).one()
        at_s = max(now_s, float(found.at_s))
        level = float(found.level) + (at_s - float(found.at_s)) * budget.amount / budget.period_s
        return min(budget.capacity, level), at_s

    def _set_level(self, connection: sa.Connection, tenant: str, budget: Budget, level: float, at_s: float) -> None:
        table = store.budgets
        same = sa.and_(table.c.tenant == tenant, table.c.budget == budget.name)
        connection.execute(table.update().where(same).values(level=level, at_s=at_s))
