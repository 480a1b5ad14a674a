"""The real scheduler and admission on devices that only count: a fake clock, seconds from the cost model.

Replicas get requests as HAProxy gives them: to the one with the fewest that are not answered yet.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from service.config import Config
from service.core.options import Priority
from service.errors import FarsightError, Kind
from service.scheduling.admission import Admission
from service.scheduling.backlog import PREEMPTION_S
from service.scheduling.batch import Batch
from service.scheduling.device_loop import DeviceLoop
from service.scheduling.scheduler import Scheduler

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


class Replica:
    """One device: its loop, what is left of each run on it, and how long it has worked."""

    def __init__(self, config: Config, number: int = 0, max_bytes: float = math.inf) -> None:
        self.config, self.number = config, number
        scheduler: Scheduler[Arrival] = Scheduler(
            config.batch_budget_s,
            max_wait_s=config.max_queue_s,
            max_bytes=max_bytes,
            tenant_weights=config.tenant_weights,
        )
        self.loop = DeviceLoop(scheduler, 0.0)
        self.admission = Admission(config)
        self.left_s: list[float] = []  # of each run on the device
        self.now_s = self.busy_s = 0.0
        self.unfinished = 0

    def arrive(self, request: Arrival) -> None:
        """Queue it or refuse it, at its own time; the device is there already."""
        if self.loop.running:  # the clocks of the shares are where it enters, even if no time has passed
            self._work(0.0)
        if request.refused is not None:  # it can never fit
            return
        ahead_s, tenant_s = self.loop.ahead(request.predicted_s, request.priority, request.tenant)
        queue = request.tenant, request.priority, self.loop.is_long(request.predicted_s)
        timeout_s = self.config.default_timeout_s
        try:
            self.admission.admit(request.predicted_s, ahead_s, timeout_s, queue=queue, tenant_s=tenant_s)
        except FarsightError as error:
            request.refused, request.retry_after_s = error.kind, error.retry_after_s
            return
        self.unfinished += 1
        self.loop.add(request)

    def next_event_s(self) -> float:
        """When the device must next be looked at, if nothing arrives."""
        if self.loop.running:
            return self.now_s + self._step_s()
        return self.now_s if self.loop.waiting else math.inf

    def advance(self, until_s: float) -> None:
        """Run the device until then."""
        while True:
            if not self.loop.running and not self._enter(self.loop.start(self.now_s)):
                self.now_s = max(self.now_s, until_s)
                return
            step_s = self._step_s()
            if self.now_s + step_s > until_s:
                if until_s > self.now_s:
                    self._work(until_s - self.now_s)
                return
            self._work(step_s)
            if self.left_s[-1] <= 1e-12:
                self._finish()
            if self.loop.running:
                used_s = self.loop.running[-1].used_s
                self._enter(self.loop.checkpoint(used_s, self.now_s))

    def _step_s(self) -> float:
        """Until the innermost run ends, or reaches a checkpoint where others wait."""
        left_s = self.left_s[-1]
        return STEP_S if left_s > STEP_S and self.loop.waiting else left_s

    def _enter(self, batch: Batch[Arrival] | None) -> bool:
        if batch is None:
            return False
        for request in batch.items:
            request.started_s = self.now_s
        self.left_s.append(batch.predicted_s)
        return True

    def _finish(self) -> None:
        """The innermost run has ended."""
        batch = self.loop.running[-1]
        self.left_s.pop()
        self.loop.finish(batch, batch.used_s)
        for request in batch.items:
            request.finished_s = self.now_s
        self.unfinished -= len(batch.items)

    def _work(self, seconds: float) -> None:
        """The innermost run uses the device."""
        self.now_s += seconds
        self.busy_s += seconds
        self.left_s[-1] -= seconds
        self.loop.served(self.loop.running[-1].used_s + seconds)


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

    for request in trace:
        catch_up(request.arrived_s)
        replica = cluster[next(iter(next(level for level in loads if level)))]
        before = replica.unfinished
        replica.advance(request.arrived_s)
        replica.arrive(request)
        moved(replica, before)
        plan(replica)
    catch_up(math.inf)
    return cluster
