"""What runs next: fair shares between classes, tenants and sizes; highest response ratio first; batches of one key.

Pure: no clock, no thread. Its owner gives `now_s` and calls it under one lock.

Shares are start-time fair queuing (Goyal, Vin, Cheng 1996) on device seconds, level by level: class, then short and
long work, then tenant. An unused share goes to the others. Within one share work goes by its response ratio,
(wait + predicted) / predicted, until it has waited `max_wait_s`: then the oldest goes first. If a share has at least
f of the device, at most Q predicted seconds are queued and no request is over P, nothing waits longer than
max_wait_s + (Q + 3 P) / f: for older requests, for what runs in its share and what interrupted that, and for a longer
run of another share that it cannot interrupt. Admission counts for each request what its share lets pass before it, so
Q is `max_queue_s` if all work is alike, and grows with the logarithm of the number of shares that are full at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Generic, Literal

from service.core.options import Priority
from service.scheduling.backlog import Backlog
from service.scheduling.batch import Batch
from service.scheduling.fair_shares import CLASS_SHARES, LONG_SHARE, SHORT_SHARE, Flow, Item, Waiting, virtual_s

Order = Literal["fair", "arrival"]  # arrival: first in, first out, without preemption

MAX_LONG = 4  # long runs on the device, each waiting for the next, which is less than half as long
STEPS_PER_OCTAVE = 4  # work within a quarter of an octave goes in order of arrival
MAX_MISFITS = 16  # requests tried after the first that does not fit a batch


def response_ratio(item: Waiting, now_s: float, used_s: float = 0.0) -> float:
    """(wait + predicted) / predicted: short work first, rising while work waits; time on the device is not waiting."""
    return (now_s - item.arrived_s - used_s + item.predicted_s) / item.predicted_s


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
        order: Order = "fair",
    ) -> None:
        """
        Args:
            batch_budget_s: predicted seconds that a batch is filled to; longer requests run alone.
            max_wait_s: after this long the oldest request of a share goes first.
            max_bytes: memory for everything that runs at one time.
            max_batch_requests: members of one batch.
            tenant_weights: shares of tenants; 1 by default.
            order: see `Order`.
        """
        self._batch_budget_s = batch_budget_s
        self._max_wait_s = max_wait_s
        self._max_bytes = max_bytes
        self._max_batch_requests = max_batch_requests
        self._by_arrival = order == "arrival"
        self._root: Flow[Item] = Flow(1.0, None)
        self._waiting: dict[int, tuple[Flow[Item], Item]] = {}  # by id(item), in order of arrival: its leaf, itself
        self._backlog: Backlog[Item] = Backlog(batch_budget_s, tenant_weights or {})
        self.is_long = self._backlog.is_long
        # predicted device seconds before a request could start, and those of them that are its own tenant's
        self.ahead = self._ahead_by_arrival if order == "arrival" else self._backlog.ahead

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def queued_s(self) -> float:
        """Predicted device seconds that wait."""
        return self._backlog.queued_s if self._waiting else 0.0

    def backlog_s(self, running: Sequence[Batch[Item]]) -> float:
        """Predicted device seconds of every request that waits or runs."""
        return self.queued_s + sum(batch.remaining_s for batch in running if not batch.is_idle)

    def add(self, item: Item) -> None:
        leaf = self._leaf(item.priority, self.is_long(item.predicted_s), item.tenant)
        leaf.enter()
        leaf.lines.setdefault(_step(item.predicted_s), {})[id(item)] = item
        self._waiting[id(item)] = leaf, item
        self._backlog.add(item)

    def discard(self, item: Item) -> bool:
        """Remove a cancelled or late request; False if it is not queued (any more)."""
        if id(item) not in self._waiting:
            return False
        self._take(item).leave()
        return True

    def next_batch(self, now_s: float, running: Sequence[Batch[Item]] = ()) -> Batch[Item] | None:
        """What should run now; None to leave the device as it is.

        `running` is on the device, innermost last. It is interrupted only by work that has more claim to the device,
        needs less than half of the time that is left, and fits in memory next to it.
        """
        if not self._waiting:
            return None
        if self._by_arrival:
            leaf, oldest = next(iter(self._waiting.values()))
            return None if running else self._batch(oldest, leaf, self._max_bytes)
        if running:
            return self._preempting(now_s, running)
        for leaf in self._root.leaves():
            if (first := self._first(leaf, now_s)) is not None:
                return self._batch(first, leaf, self._max_bytes)
        return None

    def served(self, batch: Batch[Item], used_s: float) -> None:
        """`batch` has used `used_s` of the device so far; long work is charged as it runs."""
        if batch.is_long:
            batch.leaf.charge(used_s - batch.used_s)
        batch.used_s = used_s

    def finished(self, batch: Batch[Item], used_s: float) -> None:
        """`batch` has left the device: shares were charged by prediction, now by measurement."""
        self.served(batch, used_s)
        total_s = sum(charged_s for _, charged_s in batch.charges)
        for leaf, charged_s in batch.charges:
            if not batch.is_long and total_s > 0:
                leaf.charge(charged_s * (used_s / total_s - 1))
            leaf.leave()

    def _ahead_by_arrival(
        self, predicted_s: float, priority: Priority, tenant: str, running: Sequence[Batch[Item]]
    ) -> tuple[float, float]:
        backlog_s = self.backlog_s(running)
        return backlog_s, backlog_s

    # -- small rules --------------------------------------------------------------------------------------------

    def _preempting(self, now_s: float, running: Sequence[Batch[Item]]) -> Batch[Item] | None:
        top = running[-1]
        longest_s = 0.5 * top.remaining_s
        if len(running) >= MAX_LONG and sum(batch.is_long for batch in running) >= MAX_LONG:
            longest_s = min(longest_s, self._batch_budget_s)
        bytes_left = self._max_bytes - sum([batch.peak_bytes for batch in running])
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

    def _leaf(self, priority: Priority, is_long: bool, tenant: str) -> Flow[Item]:
        of_class = self._root.child(priority, CLASS_SHARES[priority])
        of_size = of_class.child(is_long, LONG_SHARE if is_long else SHORT_SHARE)
        return of_size.child(tenant, self._backlog.weight(tenant))

    def _urgency(self, item: Item, now_s: float, used_s: float = 0.0) -> tuple[bool, float]:
        wait_s = now_s - item.arrived_s - used_s
        is_old = wait_s > self._max_wait_s
        return is_old, wait_s if is_old else response_ratio(item, now_s, used_s)

    def _first(
        self, leaf: Flow[Item], now_s: float, longest_s: float = math.inf, most_bytes: float = math.inf
    ) -> Item | None:
        """The most urgent of a share; of each size, only the one that came first is considered."""
        heads = [next(iter(line.values())) for line in leaf.lines.values()]
        fitting = [item for item in heads if item.predicted_s <= longest_s and item.peak_bytes <= most_bytes]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        return max(fitting, key=lambda item: self._urgency(item, now_s))

    def _batch(self, first: Item, leaf: Flow[Item], bytes_left: float) -> Batch[Item]:
        """`first`, then the oldest of its key, tenants in turn, until the budget or the memory is full."""
        self._take(first)
        is_long = self.is_long(first.predicted_s)
        batch = Batch([first], leaf, is_long, first.predicted_s, first.peak_bytes, [(leaf, first.predicted_s)])
        if is_long:
            return batch
        leaf.charge(first.predicted_s)
        group = self._backlog.groups.get((first.priority, first.key))
        tenants = group.tenants if group else {}
        lines = {self._leaf(first.priority, False, tenant): iter(line.values()) for tenant, line in tenants.items()}
        misfits = 0
        while lines and len(batch.items) < self._max_batch_requests and misfits <= MAX_MISFITS:
            owner = min(lines, key=virtual_s)
            item = next(lines[owner], None)
            if item is None:
                del lines[owner]
                continue
            more_s = item.predicted_s - item.shared_s
            fits_time = batch.predicted_s + more_s <= self._batch_budget_s
            if not fits_time or batch.peak_bytes + item.peak_bytes > bytes_left:
                misfits += 1  # stays where it was, at the front
                continue
            owner.charge(more_s)
            batch.items.append(item)
            batch.charges.append((owner, more_s))
            batch.predicted_s += more_s
            batch.peak_bytes += item.peak_bytes
        for item in batch.items[1:]:
            self._take(item)  # last: the lines were walked
        return batch

    def _take(self, item: Item) -> Flow[Item]:
        leaf, _ = self._waiting.pop(id(item))
        step = _step(item.predicted_s)
        line = leaf.lines[step]
        del line[id(item)]
        if not line:
            del leaf.lines[step]
        self._backlog.remove(item, is_last=not leaf.lines)
        return leaf


def _step(predicted_s: float) -> int:
    """The size class of a request."""
    return math.floor(STEPS_PER_OCTAVE * math.log2(max(predicted_s, 1e-9)))
