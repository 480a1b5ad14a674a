"""The device thread: all device work of a replica runs here, never on the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.core.options import Priority
from service.scheduling.batch import Batch
from service.scheduling.device_loop import DeviceLoop
from service.scheduling.fair_shares import Item
from service.scheduling.preemption import YieldHook

logger = logging.getLogger("farsight")


class Finished(Protocol):
    """What a run gives back; the thread itself needs only the seconds."""

    @property
    def used_s(self) -> float: ...


Outcome = TypeVar("Outcome", bound=Finished)


@dataclass(frozen=True, slots=True)
class DeviceWork(Generic[Item, Outcome]):
    """What the thread calls; given once, at construction.

    `run` computes a batch and calls the yield hook at its checkpoints. `on_started` is called with the lock held,
    before anyone can see a result; `on_finished` without it. Both, like `run`, on the device thread.
    """

    run: Callable[[Batch[Item], YieldHook], Outcome]
    on_started: Callable[[Batch[Item]], None]
    on_finished: Callable[[Batch[Item], Outcome], None]
    on_death: Callable[[], None]
    prepare: Callable[[], None] = lambda: None  # first, on the thread
    synchronize: Callable[[], None] = lambda: None  # wait until the device has done what it was given


class DeviceThread(Generic[Item, Outcome]):
    """Drives one `DeviceLoop` on a thread of its own; any thread may call its methods.

    The thread takes the next batch itself the moment it is free. Runs report their own results and errors. If something
    else raises, the thread ends, `on_death` is called, and nothing is accepted any more.
    """

    def __init__(self, loop: DeviceLoop[Item], clock: Callable[[], float], work: DeviceWork[Item, Outcome]) -> None:
        self._loop, self._clock, self._work = loop, clock, work
        self.is_long = loop.is_long
        self._condition = threading.Condition()  # guards the loop
        self._stops = self._is_dead = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stops and not self._is_dead

    @property
    def is_running(self) -> bool:
        """Something is on the device."""
        return bool(self._loop.running)

    @property
    def waiting(self) -> int:
        return self._loop.waiting

    @property
    def idle_waiting(self) -> int:
        return self._loop.idle_waiting

    @property
    def idle_is_running(self) -> bool:
        return any(batch.is_idle for batch in self._loop.running)

    def backlog_s(self) -> float:
        """Predicted device seconds of everything that waits or runs."""
        with self._condition:
            return self._loop.backlog_s()

    def ahead(self, predicted_s: float, priority: Priority, tenant: str) -> tuple[float, float]:
        """(predicted device seconds before such a request could start, those of them that are its tenant's)."""
        with self._condition:
            return self._loop.ahead(predicted_s, priority, tenant)

    def used_and_idle_s(self) -> tuple[float, float]:
        """Device seconds used and idle since the start."""
        with self._condition:
            return self._loop.used_and_idle_s(self._clock())

    def busy_share(self) -> float:
        """Share of the time since the last call that the device worked for requests."""
        return self._loop.busy_share(self._clock())

    def submit(self, item: Item) -> bool:
        """Queue it; False if the thread has ended."""
        with self._condition:
            if not self.alive:
                return False
            self._loop.add(item)
            self._condition.notify()
            return True

    def submit_idle(self, item: Item) -> None:
        """Run it when there is nothing else to do."""
        with self._condition:
            self._loop.add_idle(item)
            self._condition.notify()

    def discard(self, item: Item) -> bool:
        """Remove it from the queue; False if it is not queued (any more)."""
        with self._condition:
            return self._loop.discard(item)

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        with self._condition:
            self._stops = True
            self._condition.notify()
        self._thread.join()

    # -- on the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work.prepare()
            while (batch := self._next()) is not None:
                self._execute(batch)
                del batch  # its tensors would stay until the next one comes
        except Exception as error:
            logger.critical("the device thread ends", exc_info=error)
        finally:
            with self._condition:
                self._is_dead = True
            self._work.on_death()

    def _next(self) -> Batch[Item] | None:
        with self._condition:
            while (batch := self._loop.start(self._clock())) is None and not self._stops:
                self._condition.wait()
            if batch is not None:
                self._work.on_started(batch)
            return batch

    def _execute(self, batch: Batch[Item]) -> None:
        outcome = self._work.run(batch, self._yield_to_others)
        with self._condition:
            self._loop.finish(batch, outcome.used_s)
        self._work.on_finished(batch, outcome)

    def _yield_to_others(self, used_s: float) -> float:
        """At a checkpoint of the innermost run: run everything that should pass it. Returns the seconds that took."""
        start_s: float | None = None
        while True:
            with self._condition:
                batch = self._loop.checkpoint(used_s, self._clock())
                if batch is not None:
                    self._work.on_started(batch)
            if batch is None:
                return 0.0 if start_s is None else self._clock() - start_s
            if start_s is None:
                self._work.synchronize()  # what was enqueued is the interrupted run's time
                start_s = self._clock()
            self._execute(batch)
