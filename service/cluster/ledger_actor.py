"""The bank as one named Ray actor: replicas find it by name, Ray starts it again where it dies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from service.billing.ledger import Lease, LedgerError, LocalLedger
from service.config import Budget, Config

NAMESPACE = "farsight"
ANSWER_S = 10.0  # that a replica waits for the bank
# budgets wait for nothing else, and rows not for a long look into the ledger
MONEY, LEDGER, LOOKS = "money", "ledger", "looks"


class _Actor:
    def __init__(self, url: str, keep_days: float) -> None:
        self._bank = LocalLedger(url, keep_days)

    @ray.method(concurrency_group=MONEY)
    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        return self._bank.lease(tenant, budget, least, wanted)

    @ray.method(concurrency_group=MONEY)
    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        self._bank.give_back(tenant, budget, amount)

    @ray.method(concurrency_group=LEDGER)
    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        self._bank.record(requests, capacity)

    @ray.method(concurrency_group=LOOKS)
    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        return self._bank.usage(from_s, to_s, group_by, tenant)


# Ray's type stubs do not know concurrency groups
_remote: Any = ray.remote
_LedgerActor = _remote(num_cpus=0, max_restarts=-1, concurrency_groups={MONEY: 1, LEDGER: 1, LOOKS: 1})(_Actor)


class RemoteLedger:
    """A `Ledger` for replicas. Calls block: they are made on threads beside the event loop.

    A lease that is granted after we stopped waiting is given back; rows that are recorded twice are in the ledger
    once.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._late: list[tuple[Any, str, Budget]] = []  # leases that may still be granted
        self._actor = self._find()
        self.usage(0.0, 0.0, (), None)  # a service that could not write down what it does must not start

    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        self._take_late()
        reference = self._actor.lease.remote(tenant, budget, least, wanted)
        try:
            lease: Lease = self._answer(reference)
        except LedgerError:
            self._late.append((reference, tenant, budget))
            raise
        return lease

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        self._answer(self._actor.give_back.remote(tenant, budget, amount))

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        self._answer(self._actor.record.remote(requests, capacity))

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(self._actor.usage.remote(from_s, to_s, group_by, tenant))
        return found

    def _find(self) -> Any:
        # detached: it outlives the replicas that come and go
        options = {"name": ledger_name(self._config), "namespace": NAMESPACE, "lifetime": "detached"}
        arguments = self._config.ledger, self._config.ledger_keep_days
        return _LedgerActor.options(**options, get_if_exists=True).remote(*arguments)

    def _answer(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=ANSWER_S)
        except LedgerError as error:  # as Ray wraps it: its text is a traceback
            cause = getattr(error, "cause", error)
            raise type(cause)(str(cause)) from None
        except ActorDiedError as error:
            self._actor = self._find()
            raise LedgerError("the bank has died") from error
        except RayError as error:
            raise LedgerError(f"the bank: {type(error).__name__}") from error

    def _take_late(self) -> None:
        for one in tuple(self._late):
            reference, tenant, budget = one
            if not ray.wait([reference], timeout=0)[0]:
                continue
            self._late.remove(one)
            try:
                lease: Lease = ray.get(reference)
            except RayError:  # it was not granted
                continue
            self.give_back(tenant, budget, lease.granted)


def ledger_name(config: Config) -> str:
    """One for all replicas of a service; another for another service of the same cluster, or another ledger."""
    settings = f"{config.ledger} {config.ledger_keep_days} {version('farsight')}"
    return f"farsight-bank-{config.http_port}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
