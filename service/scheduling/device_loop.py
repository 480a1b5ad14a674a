"""What one device does next, and what passes whom at a checkpoint. The service and the simulator drive the same one.

Pure: no clock, no thread, no lock. The caller gives `now_s` and holds a lock where several threads call.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Generic

from service.scheduling.batch import Batch, idle_batch
from service.scheduling.fair_shares import Item
from service.scheduling.scheduler import Scheduler


class DeviceLoop(Generic[Item]):
    """The queue of one device and the runs on it.

    Runs are nested: each interrupts the one before it, at a checkpoint. Idle work (audits) starts only when nothing
    waits, and any request that fits in memory next to it preempts it.
    """

    def __init__(self, scheduler: Scheduler[Item], now_s: float) -> None:
        self._scheduler = scheduler
        self.running: list[Batch[Item]] = []  # innermost last
        self.add, self.is_long = scheduler.add, scheduler.is_long
        # (predicted seconds before a request could start, those of them that are its tenant's)
        self.ahead = partial(scheduler.ahead, running=self.running)
        # remove a cancelled or late request from the queue; False if it is not queued
        self.discard = scheduler.discard
        self._idle_items: deque[Item] = deque()
        self._started_s = self._asked_s = now_s
        self._used_s = self._idle_s = 0.0  # by runs that have ended; unused, when last asked
        self._worked_s = self._reported_s = 0.0  # for requests, so far; and when last reported

    @property
    def waiting(self) -> int:
        """Requests in the queue; idle work does not count."""
        return len(self._scheduler)

    @property
    def idle_waiting(self) -> int:
        return len(self._idle_items)

    def backlog_s(self) -> float:
        """Predicted device seconds of everything that waits or runs."""
        return self._scheduler.backlog_s(self.running)

    def add_idle(self, item: Item) -> None:
        """Work for a device that has nothing else to do."""
        self._idle_items.append(item)

    def start(self, now_s: float) -> Batch[Item] | None:
        """The batch that a free device should run now; None when there is nothing to do."""
        batch = self._scheduler.next_batch(now_s)
        if batch is None and self._idle_items:
            batch = idle_batch(self._idle_items.popleft())
        if batch is not None:
            self.running.append(batch)
        return batch

    def checkpoint(self, used_s: float, now_s: float) -> Batch[Item] | None:
        """The innermost run has used `used_s` so far: the batch that should interrupt it now, if any."""
        top = self.running[-1]
        if not top.is_idle:
            self._worked_s += max(0.0, used_s - top.used_s)
            self._scheduler.served(top, used_s)
        batch = self._scheduler.next_batch(now_s, self.running)
        if batch is None and top.is_idle and self.waiting:
            top.is_evicted = True  # no request fits in memory next to it
        if batch is not None:
            self.running.append(batch)
        return batch

    def served(self, used_s: float) -> None:
        """The innermost run has used `used_s` so far: charge its share."""
        top = self.running[-1]
        if not top.is_idle:
            self._worked_s += max(0.0, used_s - top.used_s)
            self._scheduler.served(top, used_s)

    def finish(self, batch: Batch[Item], used_s: float) -> None:
        """`batch` has left the device after `used_s` of its own."""
        self.running.remove(batch)
        self._used_s += used_s
        if not batch.is_idle:
            self._worked_s += max(0.0, used_s - batch.used_s)
            self._scheduler.finished(batch, used_s)

    def used_and_idle_s(self, now_s: float) -> tuple[float, float]:
        """Device seconds used and idle since the start; what runs right now is in neither yet."""
        if not self.running:
            self._idle_s = now_s - self._started_s - self._used_s
        return self._used_s, self._idle_s

    def busy_share(self, now_s: float) -> float:
        """Share of the time since the last call that the device worked for requests."""
        since_s, self._asked_s = now_s - self._asked_s, now_s
        worked_s, self._reported_s = self._worked_s - self._reported_s, self._worked_s
        return min(1.0, worked_s / since_s) if since_s > 0 else 0.0
