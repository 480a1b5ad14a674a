"""Which host work runs next: parsing, tokenising, decoding and encoding, which need a core and no device.

Pure: no thread, no clock; its owner calls it on the event loop. Slots are threads that run at the same time; the
operating system shares the cores among them. Short work finds a slot at once: long work leaves one free, and one tenant
leaves one of the slots of long work to others. Beyond that, classes and tenants get their shares of thread seconds by
the device's own rule, start-time fair queuing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from service.core.host_work import OWED, HostKind
from service.core.options import Priority
from service.scheduling.fair_shares import CLASS_SHARES, Flow

SHORT_S = 0.02  # predicted; work over it is long
MOST_SLOTS = 4
# long work of these takes up to a gigabyte: one at a time
ALONE = frozenset({HostKind.IMAGE, HostKind.AUDIO})
MOST_PAUSED = 4  # begun work that waits for others, each keeping its thread


@dataclass(frozen=True, slots=True)
class Slots:
    """How many pieces of work run at the same time."""

    total: int
    long: int
    of_tenant: int  # long ones of one tenant

    @classmethod
    def of(cls, cores: int) -> Slots:
        """One tenant's long work leaves at least half of the cores to others and to the device."""
        of_tenant = max(1, min(cores // 2, MOST_SLOTS - 2))
        return cls(of_tenant + 2, of_tenant + 1, of_tenant)


SHORT, SOON, LONG = range(3)  # lines of a leaf, in the order in which they are served
MOST_TRIED = 16  # tasks of a line, if the first have no room


@dataclass(slots=True, eq=False)
class HostTask:
    """Work that waits or runs. Seconds are predicted, of one thread."""

    kind: HostKind
    tenant: str
    priority: Priority
    predicted_s: float
    begin: Callable[[], None]  # gives it a thread, or lets it go on
    used_s: float = 0.0
    has_begun: bool = False
    holds_long_slot: bool = False
    leaf: Flow[Any] | None = field(default=None, repr=False)

    @property
    def is_long(self) -> bool:
        return self.predicted_s > SHORT_S

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.predicted_s - self.used_s)


class HostQueue:
    """Tasks that wait, and how many run."""

    def __init__(self, tenant_weights: Mapping[str, float], slots: Slots) -> None:
        """`tenant_weights`: shares of tenants, 1 by default; may change."""
        self._weights, self._slots = tenant_weights, slots
        self._root: Flow[Any] = Flow(1.0, None)
        self._waiting: dict[HostTask, None] = {}
        self._running: dict[HostTask, None] = {}
        self.long_running = 0
        self._long_of: Counter[str] = Counter()  # running, by tenant
        self._long_kinds: Counter[HostKind] = Counter()
        self.paused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def ahead_s(self, tenant: str) -> float:
        """Predicted thread seconds of a tenant's work that waits or runs."""
        tasks = (*self._waiting, *self._running)
        return sum(task.remaining_s for task in tasks if task.tenant == tenant)

    def is_running(self, task: HostTask) -> bool:
        return task in self._running

    def others_wait(self, task: HostTask) -> bool:
        """Whether pausing `task` would let another tenant run; reads only, so any thread may ask."""
        return self.paused < MOST_PAUSED and any(other.tenant != task.tenant for other in tuple(self._waiting))

    def put(self, task: HostTask) -> None:
        """Let it wait. A task that was paused goes before its tenant's others."""
        root_class = self._root.child(task.priority, CLASS_SHARES[task.priority])
        task.leaf = root_class.child(task.tenant, self._weights.get(task.tenant, 1.0))
        task.leaf.enter()
        task.leaf.lines.setdefault(_line(task), {})[id(task)] = task
        self._waiting[task] = None
        self.paused += task.has_begun

    def discard(self, task: HostTask) -> bool:
        """Remove what waits, also if it was paused; False if it is not there."""
        if task not in self._waiting:
            return False
        self._take(task)
        _leaf(task).leave()
        return True

    def start(self) -> None:
        """Begin what may run now."""
        while self._waiting and len(self._running) < self._slots.total and (task := self._next()) is not None:
            self._take(task)
            self._running[task] = None
            task.holds_long_slot = task.is_long
            if task.holds_long_slot:
                self.long_running += 1
                self._long_of[task.tenant] += 1
                self._long_kinds[task.kind] += 1
            task.begin()
            task.has_begun = True

    def stopped(self, task: HostTask, used_s: float) -> None:
        """It ended or pauses, after `used_s` more of its thread; `put` it again if it pauses."""
        del self._running[task]
        task.used_s += used_s
        if task.holds_long_slot:
            self.long_running -= 1
            self._long_of[task.tenant] -= 1
            self._long_kinds[task.kind] -= 1
        _leaf(task).charge(used_s)
        _leaf(task).leave()
        if task.used_s > task.predicted_s:  # from here on it is long
            task.predicted_s = 2 * task.used_s

    def _next(self) -> HostTask | None:
        for leaf in self._root.leaves():
            for line in (SHORT, SOON, LONG):
                tasks: Iterable[HostTask] = leaf.lines.get(line, {}).values()
                for task in islice(tasks, MOST_TRIED):
                    if line == SHORT or self._has_room(task):
                        return task
        return None

    def _has_room(self, task: HostTask) -> bool:
        """For one more long task."""
        is_alone = task.kind in ALONE and self._long_kinds[task.kind] > 0
        has_slot = self.long_running < self._slots.long and self._long_of[task.tenant] < self._slots.of_tenant
        return has_slot and not is_alone

    def _take(self, task: HostTask) -> None:
        del self._waiting[task]
        for line in _leaf(task).lines.values():
            line.pop(id(task), None)
        self.paused -= task.has_begun


def _line(task: HostTask) -> int:
    if not task.is_long:
        return SHORT
    return SOON if task.has_begun or task.kind in OWED else LONG


def _leaf(task: HostTask) -> Flow[Any]:
    assert task.leaf is not None, "bug: the task was never queued"
    return task.leaf
