"""What runs next: fair shares between classes, tenants and sizes; highest response ratio first; batches of one key.

Pure and clock-free: every call is given `now_s`. Its owner calls it under one lock.

Shares are start-time fair queuing (Goyal, Vin, Cheng 1996) on device seconds, level by level: class, then short and
long work, then tenant. A share that nobody uses goes to the others. Within one share work goes by its response ratio,
(wait + predicted) / predicted, until it has waited `max_wait_s`: then the oldest goes first. Where a share has no less
than f of the device, at most Q predicted seconds are queued and no request is over P, nothing waits longer than
max_wait_s + (Q + 3 P) / f: those that are older, what runs in its share with what interrupted that, and a longer run of
another share that it cannot interrupt. Admission counts for each request what its share lets pass before it, so Q is
`max_queue_s` where all work is alike, and grows with the logarithm of the number of shares that are full at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal

from service.core.options import Priority
from service.scheduling.fair_shares import CLASS_SHARES, LONG_SHARE, SHORT_SHARE, Flow, Item, Waiting, virtual_s

PREEMPTION_S = 0.05  # longest time that a run keeps the device from shorter work
MAX_LONG = 4  # long runs on the device, each waiting for the next, which is less than half as long
STEPS_PER_OCTAVE = 4  # work within a quarter of an octave goes in order of arrival
MAX_MISFITS = 16  # requests looked at after the first that does not fit a batch


def response_ratio(item: Waiting, now_s: float, used_s: float = 0.0) -> float:
    """(wait + predicted) / predicted: short work first, rising while work waits; time on the device is no wait."""
    return (now_s - item.arrived_s - used_s + item.predicted_s) / item.predicted_s


@dataclass(slots=True, eq=False)
class Batch(Generic[Item]):
    """What runs together. The device thread keeps `used_s`: its seconds so far, without what ran in between."""

    items: list[Item]
    leaf: Flow[Item]
    is_long: bool
    predicted_s: float
    peak_bytes: int
    charges: list[tuple[Flow[Item], float]]  # seconds that each member's share was charged
    used_s: float = 0.0

    @property
    def remaining_s(self) -> float:
        """Predicted; a run that is over its prediction is not about to end for that."""
        return max(self.predicted_s - self.used_s, 0.25 * self.used_s)


@dataclass(slots=True)
class _Group(Generic[Item]):
    """Short requests of one class and key, by tenant and arrival: those that may share a batch."""

    own_s: float = 0.0
    shared_s: float = 0.0
    total_s: float = 0.0  # predicted of the batches that they will make
    tenants: dict[str, dict[int, Item]] = field(default_factory=dict)

    def changed(self, target_s: float) -> float:
        """The change of `total_s`. What a batch pays once counts once for each batch that they will make."""
        before_s, self.total_s = self.total_s, 0.0
        if self.tenants:
            batches = math.ceil(self.own_s / max(target_s - self.shared_s, 0.1 * target_s) or 1)
            self.total_s = self.own_s + self.shared_s * batches
        return self.total_s - before_s


class Scheduler(Generic[Item]):
    """The queue of one device."""

    def __init__(
        self,
        batch_budget_s: float,
        *,
        max_wait_s: float = 30.0,
        max_bytes: float = math.inf,
        max_batch_requests: int = 256,
        tenant_weights: Mapping[str, float] | None = None,
        order: Literal["fair", "arrival"] = "fair",
    ) -> None:
        self._target_slice_s = batch_budget_s
        self._max_wait_s = max_wait_s
        self._max_bytes = max_bytes
        self._max_batch_requests = max_batch_requests
        self._tenant_weights = tenant_weights or {}
        self._by_arrival = order == "arrival"
        self._root: Flow[Item] = Flow(1.0, None)
        self._waiting: dict[int, tuple[Flow[Item], Item]] = {}  # by id(item), in order of arrival: its leaf, itself
        self._groups: dict[tuple[Priority, Hashable], _Group[Item]] = {}
        self._short_s = 0.0  # with what a batch pays once counted once a batch
        # predicted seconds by class, short or long, and tenant
        self._of_tenants: dict[tuple[Priority, bool], dict[str, float]] = {
            (priority, is_long): {} for priority in Priority for is_long in (False, True)
        }

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def queued_s(self) -> float:
        """Predicted device seconds that wait."""
        long_s = sum(sum(self._of_tenants[priority, True].values()) for priority in Priority)
        return max(0.0, self._short_s + long_s) if self._waiting else 0.0

    def backlog_s(self, running: Sequence[Batch[Item]]) -> float:
        """Predicted device seconds of all that waits or runs."""
        return self.queued_s + sum(batch.remaining_s for batch in running)

    def ahead(
        self, predicted_s: float, priority: Priority, tenant: str, running: Sequence[Batch[Item]]
    ) -> tuple[float, float]:
        """Predicted device seconds before a request could start; those of them that are its own tenant's.

        Of what the others in its share have queued, then of short work if it is long, then of the other class no more
        counts than their shares let pass while what counts already, and itself, is done (generalised processor sharing,
        Parekh and Gallager 1993): who asks for little does not wait behind who asks for much. Who comes later, and
        shares what is left, is not known yet.
        """
        if self._by_arrival:
            return self.backlog_s(running), self.backlog_s(running)
        is_long = self.is_long(predicted_s)
        queued = {name: seconds.copy() for name, seconds in self._of_tenants.items()}
        now_s = 0.0 if is_long or not running else PREEMPTION_S
        for batch in running:
            if batch.is_long:
                item = batch.items[0]
                own = queued[item.priority, True]
                own[item.tenant] = own.get(item.tenant, 0.0) + batch.remaining_s
            else:
                now_s += batch.remaining_s
        own_s = queued[priority, is_long].pop(tenant, 0.0)
        turns = (own_s + predicted_s) / self._weight(tenant)
        ahead_s = own_s + sum(min(one, turns * self._weight(name)) for name, one in queued[priority, is_long].items())
        if is_long:
            short_s = sum(queued[priority, False].values())
            ahead_s += min(short_s, SHORT_SHARE / LONG_SHARE * (ahead_s + predicted_s))
        for other, share in CLASS_SHARES.items():
            if other is not priority:  # its long work lets short work pass
                theirs_s = sum(queued[other, False].values()) + is_long * sum(queued[other, True].values())
                ahead_s += min(theirs_s, share / CLASS_SHARES[priority] * (ahead_s + predicted_s))
        if not is_long:  # what a batch pays once is in the prediction of each of its requests
            ahead_s = min(ahead_s, self._short_s)
        return now_s + max(0.0, ahead_s), own_s

    def is_long(self, predicted_s: float) -> bool:
        return predicted_s > self._target_slice_s

    def add(self, item: Item) -> None:
        leaf = self._leaf(item)
        leaf.enter()
        leaf.lines.setdefault(_step(item.predicted_s), {})[id(item)] = item
        self._waiting[id(item)] = leaf, item
        of_tenants = self._of_tenants[item.priority, self.is_long(item.predicted_s)]
        of_tenants[item.tenant] = of_tenants.get(item.tenant, 0.0) + item.predicted_s
        if self.is_long(item.predicted_s):
            return
        group = self._groups.setdefault((item.priority, item.key), _Group())
        group.tenants.setdefault(item.tenant, {})[id(item)] = item
        group.own_s += item.predicted_s - item.shared_s
        group.shared_s = item.shared_s
        self._short_s += group.changed(self._target_slice_s)

    def discard(self, item: Item) -> bool:
        """Take a cancelled or late request out; False where it is no longer queued."""
        if id(item) not in self._waiting:
            return False
        self._take(item).leave()
        return True

    def next_batch(self, now_s: float, running: Sequence[Batch[Item]] = ()) -> Batch[Item] | None:
        """What should run now; None when idle.

        `running` is what waits on the device, innermost last. It goes on (None) unless other work has more claim to the
        device, needs less than half of the time that is left, and fits the memory beside it.
        """
        if not self._waiting:
            return None
        if self._by_arrival:
            leaf, oldest = next(iter(self._waiting.values()))
            return None if running else self._batch(oldest, leaf, self._max_bytes)
        if not running:
            for leaf in self._root.leaves():
                if (first := self._first(leaf, now_s)) is not None:
                    return self._batch(first, leaf, self._max_bytes)
            return None
        top = running[-1]
        longest_s = 0.5 * top.remaining_s
        if len(running) >= MAX_LONG and sum(one.is_long for one in running) >= MAX_LONG:
            longest_s = min(longest_s, self._target_slice_s)
        bytes_left = self._max_bytes - sum([one.peak_bytes for one in running])
        for leaf in self._root.leaves():
            is_own = leaf is top.leaf
            if not top.is_long and leaf.parent is top.leaf.parent:
                return None  # short work of its class waits until it ends
            first = self._first(leaf, now_s, longest_s, bytes_left)
            if first is not None and is_own:
                owner = self._urgency(top.items[0], now_s, top.used_s)
                first = first if self._urgency(first, now_s) > owner else None
            if first is not None:
                return self._batch(first, leaf, bytes_left)
            if is_own:
                return None
        return None

    def served(self, batch: Batch[Item], used_s: float) -> None:
        """`batch` has used `used_s` of the device so far; long work pays as it goes."""
        if batch.is_long:
            batch.leaf.charge(used_s - batch.used_s)
        batch.used_s = used_s

    def finished(self, batch: Batch[Item], used_s: float) -> None:
        """`batch` is off the device: shares were charged by prediction, now by measurement."""
        self.served(batch, used_s)
        total_s = sum(charged_s for _, charged_s in batch.charges)
        for leaf, charged_s in batch.charges:
            if not batch.is_long and total_s > 0:
                leaf.charge(charged_s * (used_s / total_s - 1))
            leaf.leave()

    # -- small rules --------------------------------------------------------------------------------------------

    def _leaf(self, item: Item) -> Flow[Item]:
        return self._flow(item.priority, self.is_long(item.predicted_s), item.tenant)

    def _flow(self, priority: Priority, is_long: bool, tenant: str) -> Flow[Item]:
        of_class = self._root.child(priority, CLASS_SHARES[priority])
        of_size = of_class.child(is_long, LONG_SHARE if is_long else SHORT_SHARE)
        return of_size.child(tenant, self._weight(tenant))

    def _weight(self, tenant: str) -> float:
        return self._tenant_weights.get(tenant, 1.0)

    def _urgency(self, item: Item, now_s: float, used_s: float = 0.0) -> tuple[bool, float]:
        wait_s = now_s - item.arrived_s - used_s
        is_old = wait_s > self._max_wait_s
        return is_old, wait_s if is_old else response_ratio(item, now_s, used_s)

    def _first(
        self, leaf: Flow[Item], now_s: float, longest_s: float = math.inf, most_bytes: float = math.inf
    ) -> Item | None:
        """The most urgent of a share: of each size the one that came first."""
        heads = [next(iter(line.values())) for line in leaf.lines.values()]
        fitting = [item for item in heads if item.predicted_s <= longest_s and item.peak_bytes <= most_bytes]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        return max(fitting, key=lambda item: self._urgency(item, now_s))

    def _batch(self, first: Item, leaf: Flow[Item], bytes_left: float) -> Batch[Item]:
        """`first`, then the oldest of its key, by turns of the tenants, until the slice or the memory is full."""
        self._take(first)
        is_long = self.is_long(first.predicted_s)
        batch = Batch([first], leaf, is_long, first.predicted_s, first.peak_bytes, [(leaf, first.predicted_s)])
        if is_long:
            return batch
        leaf.charge(first.predicted_s)
        group = self._groups.get((first.priority, first.key))
        of_tenants = group.tenants if group else {}
        lines = {self._flow(first.priority, False, tenant): iter(line.values()) for tenant, line in of_tenants.items()}
        misfits = 0
        while lines and len(batch.items) < self._max_batch_requests and misfits <= MAX_MISFITS:
            own = min(lines, key=virtual_s)
            item = next(lines[own], None)
            if item is None:
                del lines[own]
                continue
            more_s = item.predicted_s - item.shared_s
            fits_time = batch.predicted_s + more_s <= self._target_slice_s
            if not fits_time or batch.peak_bytes + item.peak_bytes > bytes_left:
                misfits += 1  # stays where it was, at the front
                continue
            own.charge(more_s)
            batch.items.append(item)
            batch.charges.append((own, more_s))
            batch.predicted_s += more_s
            batch.peak_bytes += item.peak_bytes
        for item in batch.items[1:]:
            self._take(item)  # last, for the lines were walked
        return batch

    def _take(self, item: Item) -> Flow[Item]:
        leaf, _ = self._waiting.pop(id(item))
        step = _step(item.predicted_s)
        line = leaf.lines[step]
        del line[id(item)]
        if not line:
            del leaf.lines[step]
        of_tenants = self._of_tenants[item.priority, self.is_long(item.predicted_s)]
        of_tenants[item.tenant] -= item.predicted_s
        if not leaf.lines:
            del of_tenants[item.tenant]  # and with it what rounding has left
        if self.is_long(item.predicted_s):
            return leaf
        name = item.priority, item.key
        group = self._groups[name]
        of_tenant = group.tenants[item.tenant]
        del of_tenant[id(item)]
        if not of_tenant:
            del group.tenants[item.tenant]
        group.own_s -= item.predicted_s - item.shared_s
        self._short_s += group.changed(self._target_slice_s)
        if not group.tenants:
            del self._groups[name]
        return leaf


def beneath(item: Item) -> Batch[Item]:
    """A run with no claim to the device at all: whatever comes runs first, within the memory beside it."""
    return Batch([item], Flow(1.0, None), True, math.inf, item.peak_bytes, [])


def _step(predicted_s: float) -> int:
    return math.floor(STEPS_PER_OCTAVE * math.log2(max(predicted_s, 1e-9)))
