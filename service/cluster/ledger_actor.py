"""The ledger as one named Ray actor, which replicas find by name and Ray restarts when it dies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from logging import getLogger
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from service.billing.ledger import LeaseGrant, LedgerError, LedgerFull, LocalLedger
from service.config import Budget, Config
from service.telemetry import logging

logger = getLogger("farsight")

NAMESPACE = "farsight"
TIMEOUT_S = 10.0  # of a call to the actor
# a thread each: leases wait for nothing else, and writes not for long queries
BUDGETS, WRITES, QUERIES = "budgets", "writes", "queries"


class _LedgerActor:
    def __init__(self, url: str, keep_days: float) -> None:
        logging.configure("WARNING")
        self._ledger = LocalLedger(url, keep_days)

    @ray.method(concurrency_group=BUDGETS)
    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant:
        return self._ledger.lease(tenant, budget, least, most)

    @ray.method(concurrency_group=BUDGETS)
    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        self._ledger.give_back(tenant, budget, amount)

    @ray.method(concurrency_group=WRITES)
    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        self._ledger.record(requests, capacity)

    @ray.method(concurrency_group=QUERIES)
    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        return self._ledger.usage(from_s, to_s, group_by, tenant)


_remote: Any = ray.remote  # Ray's type stubs lack concurrency groups
_RemoteActor = _remote(num_cpus=0, max_restarts=-1, concurrency_groups={BUDGETS: 1, WRITES: 1, QUERIES: 1})(
    _LedgerActor
)


class RemoteLedger:
    """A `Ledger` for replicas. Calls block, so they are made on threads, never on the event loop.

    A lease granted after its call timed out is given back; rows recorded twice are in the ledger once.
    """

    def __init__(self, config: Config) -> None:
        """Raises LedgerError if the ledger is unavailable: a service that cannot record usage must not start.

        If only its disk is full, it starts: what it accepts is in write-ahead logs until there is room.
        """
        self._config = config
        self._timed_out: list[tuple[Any, str, Budget]] = []  # leases that may still be granted
        self._actor = self._find()
        try:
            self.usage(0.0, 0.0, (), None)
        except LedgerFull as error:
            logger.error("the ledger cannot be written yet: %s", error)

    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant:
        self._return_late_grants()
        reference = self._actor.lease.remote(tenant, budget, least, most)
        try:
            grant: LeaseGrant = self._get(reference)
        except LedgerError:
            self._timed_out.append((reference, tenant, budget))
            raise
        return grant

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        self._get(self._actor.give_back.remote(tenant, budget, amount))

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        self._get(self._actor.record.remote(requests, capacity))

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        found: dict[str, Any] = self._get(self._actor.usage.remote(from_s, to_s, group_by, tenant))
        return found

    def _find(self) -> Any:
        # detached: it outlives each replica
        options = {"name": ledger_name(self._config), "namespace": NAMESPACE, "lifetime": "detached"}
        arguments = self._config.ledger, self._config.ledger_keep_days
        return _RemoteActor.options(**options, get_if_exists=True).remote(*arguments)

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=TIMEOUT_S)
        except LedgerError as error:  # without Ray's wrapping, whose text is a traceback
            cause = getattr(error, "cause", error)
            raise type(cause)(str(cause)) from None
        except ActorDiedError as error:
            self._actor = self._find()
            raise LedgerError("the ledger's actor died") from error
        except RayError as error:
            raise LedgerError(f"the ledger's actor: {type(error).__name__}") from error

    def _return_late_grants(self) -> None:
        for call in tuple(self._timed_out):
            reference, tenant, budget = call
            if not ray.wait([reference], timeout=0)[0]:
                continue
            self._timed_out.remove(call)
            try:
                grant: LeaseGrant = ray.get(reference)
            except RayError:  # it was not granted
                continue
            self.give_back(tenant, budget, grant.amount)


def ledger_name(config: Config) -> str:
    """The actor's name: the same for all replicas of a service, different for other services, ledgers and versions."""
    settings = f"{config.ledger} {config.ledger_keep_days} {version('farsight')}"
    return f"farsight-ledger-{config.http_port}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
