"""The bank as one named Ray actor: replicas find it by name, Ray starts it again where it dies."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from service.billing.bank import BankError, Lease, LocalBank
from service.config import Budget, Config

NAMESPACE = "farsight"
ANSWER_S = 10.0  # that a replica waits for the bank
MONEY, LEDGER = "money", "ledger"  # budgets need not wait for a long look into the ledger

logger = logging.getLogger("farsight")


class _Actor:
    def __init__(self, url: str, keep_days: float) -> None:
        self._bank = LocalBank(url, keep_days)

    @ray.method(concurrency_group=MONEY)
    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        return self._bank.lease(tenant, budget, least, wanted)

    @ray.method(concurrency_group=MONEY)
    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        self._bank.give_back(tenant, budget, amount)

    @ray.method(concurrency_group=LEDGER)
    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        self._bank.record(requests, capacity)

    @ray.method(concurrency_group=LEDGER)
    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        return self._bank.usage(from_s, to_s, group_by, tenant)


# Ray's type stubs do not know concurrency groups
_remote: Any = ray.remote
_BankActor = _remote(num_cpus=0, max_restarts=-1, concurrency_groups={MONEY: 1, LEDGER: 2})(_Actor)


class RemoteBank:
    """A `Bank` for replicas. Calls block: they are made on threads beside the event loop.

    A lease whose answer was lost on the way is not asked for again by itself: it is spent by nobody, and the budget
    refills. Rows that are recorded twice are in the ledger once.
    """

    def __init__(self, config: Config) -> None:
        # detached: it outlives the replicas that come and go
        self._actor = _BankActor.options(
            name=bank_name(config), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(config.ledger, config.ledger_keep_days)
        self.usage(0.0, 0.0, (), None)  # a service that could not write down what it does must not start

    def lease(self, tenant: str, budget: Budget, least: float, wanted: float) -> Lease:
        lease: Lease = _answer(self._actor.lease.remote(tenant, budget, least, wanted))
        return lease

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        _answer(self._actor.give_back.remote(tenant, budget, amount))

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        _answer(self._actor.record.remote(requests, capacity))

    def usage(self, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        found: dict[str, Any] = _answer(self._actor.usage.remote(from_s, to_s, group_by, tenant))
        return found


def bank_name(config: Config) -> str:
    """One for all replicas of a service; another for another service of the same cluster."""
    return f"farsight-bank-{config.http_port}"


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=ANSWER_S)
    except RayError as error:  # dead, or slow; BankErrors of its own arrive as such
        raise BankError(f"the bank: {type(error).__name__}") from error
