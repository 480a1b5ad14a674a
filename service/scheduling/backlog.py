"""What waits for a device, in predicted seconds: by class, size and tenant, and what is ahead of a new request."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from service.core.options import Priority
from service.scheduling.batch import Batch
from service.scheduling.fair_shares import CLASS_SHARES, LONG_SHARE, SHORT_SHARE, Item

PREEMPTION_S = 0.05  # longest time that a run keeps the device from shorter work


@dataclass(slots=True)
class Group(Generic[Item]):
    """Short requests of one class and key, by tenant and arrival: those that may share a batch."""

    members_s: float = 0.0  # predicted, without what a batch pays once
    shared_s: float = 0.0  # what a batch pays once
    total_s: float = 0.0  # predicted for the batches that they will form
    tenants: dict[str, dict[int, Item]] = field(default_factory=dict)

    def updated(self, budget_s: float) -> float:
        """The change of `total_s`."""
        before_s, self.total_s = self.total_s, 0.0
        if self.tenants:
            batches = math.ceil(self.members_s / max(budget_s - self.shared_s, 0.1 * budget_s) or 1)
            self.total_s = self.members_s + self.shared_s * batches
        return self.total_s - before_s


class Backlog(Generic[Item]):
    """Sums over queued requests, kept up to date one by one."""

    def __init__(self, batch_budget_s: float, tenant_weights: Mapping[str, float]) -> None:
        self._batch_budget_s, self._tenant_weights = batch_budget_s, tenant_weights
        self.groups: dict[tuple[Priority, Hashable], Group[Item]] = {}  # short requests that may share a batch
        self._short_s = 0.0  # what a batch pays once is counted once per batch
        # predicted seconds by class, short or long, and tenant
        self._tenants_s: dict[tuple[Priority, bool], dict[str, float]] = {
            (priority, is_long): {} for priority in Priority for is_long in (False, True)
        }

    def is_long(self, predicted_s: float) -> bool:
        """More than one batch's budget: it runs alone, in slices."""
        return predicted_s > self._batch_budget_s

    def weight(self, tenant: str) -> float:
        return self._tenant_weights.get(tenant, 1.0)

    @property
    def queued_s(self) -> float:
        """Predicted device seconds that wait."""
        long_s = sum(sum(self._tenants_s[priority, True].values()) for priority in Priority)
        return max(0.0, self._short_s + long_s)

    def add(self, item: Item) -> None:
        is_long = self.is_long(item.predicted_s)
        tenants_s = self._tenants_s[item.priority, is_long]
        tenants_s[item.tenant] = tenants_s.get(item.tenant, 0.0) + item.predicted_s
        if is_long:
            return
        group = self.groups.setdefault((item.priority, item.key), Group())
        group.tenants.setdefault(item.tenant, {})[id(item)] = item
        group.members_s += item.predicted_s - item.shared_s
        group.shared_s = item.shared_s
        self._short_s += group.updated(self._batch_budget_s)

    def remove(self, item: Item, *, is_last: bool) -> None:
        """`is_last`: its tenant has no other request of this class and size."""
        is_long = self.is_long(item.predicted_s)
        tenants_s = self._tenants_s[item.priority, is_long]
        tenants_s[item.tenant] -= item.predicted_s
        if is_last:
            del tenants_s[item.tenant]  # and with it what rounding has left
        if is_long:
            return
        name = item.priority, item.key
        group = self.groups[name]
        members = group.tenants[item.tenant]
        del members[id(item)]
        if not members:
            del group.tenants[item.tenant]
        group.members_s -= item.predicted_s - item.shared_s
        self._short_s += group.updated(self._batch_budget_s)
        if not group.tenants:
            del self.groups[name]

    def ahead(
        self, predicted_s: float, priority: Priority, tenant: str, running: Sequence[Batch[Item]]
    ) -> tuple[float, float]:
        """Predicted device seconds before a request could start, and those of them that are its own tenant's.

        Only what its share lets pass is counted while it waits: of what other tenants in its share have queued, then of
        short work if it is long, then of the other class. So a tenant that asks for little does not wait behind one
        that asks for much. Requests that arrive later, and share what is left, are not known yet. Ref: generalised
        processor sharing (Parekh and Gallager 1993).
        """
        is_long = self.is_long(predicted_s)
        queued_s = {name: seconds.copy() for name, seconds in self._tenants_s.items()}
        requests = [batch for batch in running if not batch.is_idle]  # idle work is never in anyone's way
        now_s = 0.0 if is_long or not requests else PREEMPTION_S
        for batch in requests:
            if batch.is_long:
                item = batch.items[0]
                long_s = queued_s[item.priority, True]
                long_s[item.tenant] = long_s.get(item.tenant, 0.0) + batch.remaining_s
            else:
                now_s += batch.remaining_s
        tenant_s = queued_s[priority, is_long].pop(tenant, 0.0)
        weights = self._tenant_weights
        turns = (tenant_s + predicted_s) / weights.get(tenant, 1.0)
        ahead_s = tenant_s
        ahead_s += sum(
            min(theirs_s, turns * weights.get(name, 1.0)) for name, theirs_s in queued_s[priority, is_long].items()
        )
        if is_long:
            short_s = sum(queued_s[priority, False].values())
            ahead_s += min(short_s, SHORT_SHARE / LONG_SHARE * (ahead_s + predicted_s))
        for other, share in CLASS_SHARES.items():
            if other is not priority:  # its long work lets short work pass
                theirs_s = sum(queued_s[other, False].values()) + is_long * sum(queued_s[other, True].values())
                ahead_s += min(theirs_s, share / CLASS_SHARES[priority] * (ahead_s + predicted_s))
        if not is_long:  # what a batch pays once is in the prediction of each of its requests
            ahead_s = min(ahead_s, self._short_s)
        return now_s + max(0.0, ahead_s), tenant_s
