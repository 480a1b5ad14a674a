"""The real scheduler and admission on devices that only count: a fake clock, seconds from the cost model.

Replicas get requests as HAProxy gives them: to the one with the fewest that are not answered yet.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from service.config import Config
from service.core.options import Priority
from service.errors import FarsightError, Kind
from service.scheduling.admission import Admission
from service.scheduling.scheduler import PREEMPTION_S, Batch, Scheduler

STEP_S = 0.8 * PREEMPTION_S  # between checkpoints of a run


@dataclass(slots=True, eq=False)
class Arrival:
    """One request of a trace, and what became of it."""

    arrived_s: float
    predicted_s: float
    key: Hashable = "attention"
    shared_s: float = 0.0
    priority: Priority = Priority.INTERACTIVE
    tenant: str = "default"
    peak_bytes: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    refused: Kind | None = None
    retry_after_s: float | None = None

    @property
    def latency_s(self) -> float:
        assert self.finished_s is not None, "bug: not finished"
        return self.finished_s - self.arrived_s


@dataclass(slots=True, eq=False)
class Replica:
    """One device: its queue, what runs on it, and how long it has worked."""

    config: Config
    number: int = 0
    max_bytes: float = math.inf
    scheduler: Scheduler[Arrival] = field(init=False)
    admission: Admission = field(init=False)
    stack: list[Batch[Arrival]] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)  # of each run of the stack
    now_s: float = 0.0
    busy_s: float = 0.0
    unfinished: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.config.batch_budget_s,
            max_wait_s=self.config.max_queue_s,
            max_bytes=self.max_bytes,
            tenant_weights=self.config.tenant_weights,
            order=self.config.order,
        )
        self.admission = Admission(self.config)

    def arrive(self, one: Arrival) -> None:
        """Queue it or refuse it, at its own time; the device is there already."""
        if self.stack:  # the clocks of the shares are where it enters, even if no time has passed since another came
            self._work(0.0)
        if one.refused is not None:  # it can never fit
            return
        ahead_s, own_s = self.scheduler.ahead(one.predicted_s, one.priority, one.tenant, self.stack)
        queue = one.tenant, one.priority, self.scheduler.is_long(one.predicted_s)
        try:
            self.admission.admit(one.predicted_s, ahead_s, self.config.default_timeout_s, queue=queue, own_s=own_s)
        except FarsightError as error:
            one.refused, one.retry_after_s = error.kind, error.retry_after_s
            return
        self.unfinished += 1
        self.scheduler.add(one)

    def next_event_s(self) -> float:
        """When the device must next be looked at, if nothing arrives."""
        if self.stack:
            return self.now_s + self._step_s()
        return self.now_s if len(self.scheduler) else math.inf

    def advance(self, until_s: float) -> None:
        """Run the device until then."""
        while True:
            if not self.stack:
                batch = self.scheduler.next_batch(self.now_s)
                if batch is None:
                    self.now_s = max(self.now_s, until_s)
                    return
                self._push(batch)
            step_s = self._step_s()
            if self.now_s + step_s > until_s:
                if until_s > self.now_s:
                    self._work(until_s - self.now_s)
                return
            self._work(step_s)
            if self.left_s[-1] <= 1e-12:
                self._pop()
            if self.stack and (batch := self.scheduler.next_batch(self.now_s, self.stack)) is not None:
                self._push(batch)

    def _step_s(self) -> float:
        """Until the innermost run ends, or comes to a checkpoint where others wait."""
        left_s = self.left_s[-1]
        return STEP_S if left_s > STEP_S and len(self.scheduler) else left_s

    def _push(self, batch: Batch[Arrival]) -> None:
        for one in batch.items:
            one.started_s = self.now_s
        self.stack.append(batch)
        self.left_s.append(batch.predicted_s)

    def _pop(self) -> None:
        """The innermost run has ended."""
        batch = self.stack.pop()
        self.left_s.pop()
        self.scheduler.finished(batch, batch.used_s)
        for one in batch.items:
            one.finished_s = self.now_s
        self.unfinished -= len(batch.items)

    def _work(self, seconds: float) -> None:
        self.now_s += seconds
        self.busy_s += seconds
        self.left_s[-1] -= seconds
        self.scheduler.served(self.stack[-1], self.stack[-1].used_s + seconds)


def simulate(trace: Iterable[Arrival], replicas: int, config: Config, max_bytes: float = math.inf) -> list[Replica]:
    """Run a whole trace, in order of arrival; the arrivals are filled in."""
    cluster = [Replica(config, number, max_bytes) for number in range(replicas)]
    events: list[tuple[float, int]] = []  # when a replica must be looked at; old ones do no harm
    planned_s = [math.inf] * replicas
    loads: list[dict[int, None]] = [dict.fromkeys(range(replicas))]  # by requests not answered yet

    def moved(replica: Replica, before: int) -> None:
        if replica.unfinished == before:
            return
        del loads[before][replica.number]
        while len(loads) <= replica.unfinished:
            loads.append({})
        loads[replica.unfinished][replica.number] = None

    def catch_up(until_s: float) -> None:
        while events and events[0][0] <= until_s:
            at_s, number = heapq.heappop(events)
            if planned_s[number] > at_s + 1e-9:  # it was looked at since
                continue
            replica = cluster[number]
            before = replica.unfinished
            replica.advance(at_s)
            moved(replica, before)
            plan(replica)

    def plan(replica: Replica) -> None:
        at_s = planned_s[replica.number] = replica.next_event_s()
        if at_s < math.inf:
            heapq.heappush(events, (at_s, replica.number))

    for one in trace:
        catch_up(one.arrived_s)
        replica = cluster[next(iter(next(level for level in loads if level)))]
        before = replica.unfinished
        replica.advance(one.arrived_s)
        replica.arrive(one)
        moved(replica, before)
        plan(replica)
    catch_up(math.inf)
    return cluster
