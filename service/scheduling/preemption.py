"""One run on the device: its own time, its pauses, and the checkpoints at which it stops or lets other work run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.core.run import RunRecord
from service.telemetry.energy import Energy

SHORTEST_SLICE_S = 0.005  # small layers reach a checkpoint every few microseconds
MAX_PAUSES = 64  # pauses of one run that are kept one by one

YieldHook = Callable[[float], float]  # seconds the run has used -> seconds that other work had the device


class Abandoned(Exception):
    """Every caller of this run has cancelled or timed out."""


class DeviceLost(Exception):
    """The device no longer responds; no request of this replica can be computed."""


class Awaited(Protocol):
    """A request of the run, as far as its callers go."""

    @property
    def cancelled(self) -> bool: ...
    @property
    def deadline_s(self) -> float: ...


class Evictable(Protocol):
    """A batch that may have to stop for other reasons than its callers'."""

    @property
    def is_evicted(self) -> bool: ...


class EnqueuedWork(Protocol):
    """What a device was given during one run; `service.device.DeviceQueue` implements it."""

    def mark(self) -> None:
        """Note this point, and wait until the device is at most a few marks behind."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""
        ...


@dataclass(frozen=True, slots=True)
class RunEnvironment:
    """What every run of one device shares. `energy` is None where no counter can be read."""

    clock: Callable[[], float]
    new_queue: Callable[[], EnqueuedWork] | None = None  # None: nothing is enqueued, as on a CPU
    energy: Energy | None = None


class DeviceRun:
    """Measures one run, and is its checkpoint."""

    def __init__(
        self,
        environment: RunEnvironment,
        yield_hook: YieldHook,
        waiting: Sequence[Awaited],
        batch: Evictable,
    ) -> None:
        """`waiting`: the requests whose callers need the result; the run stops when none does, or it is evicted."""
        self._clock, self._energy = environment.clock, environment.energy
        self._queue = None if environment.new_queue is None else environment.new_queue()
        self._yield_hook, self._waiting, self._batch = yield_hook, waiting, batch
        self.started_s = self._resumed_s = self._clock()
        self.paused_s = self.slice_s = 0.0
        self._pauses: list[tuple[float, float]] = []
        self._has_begun = False
        self.joules: float | None = None
        if self._energy is not None:
            self._energy.begin()

    @property
    def used_s(self) -> float:
        """Seconds since the start without the pauses."""
        return self._clock() - self.started_s - self.paused_s

    def checkpoint(self) -> None:
        """Called by kernels and layers every few milliseconds or more often.

        Raises Abandoned, and DeviceLost if the work that ran in between failed in a way that is not its own.
        """
        now_s = self._clock()
        if now_s - self._resumed_s < SHORTEST_SLICE_S and self._has_begun:
            return
        self._has_begun = True
        if self._queue is not None:
            self._queue.mark()
            now_s = self._clock()  # a mark may wait
        self._end_slice(now_s)
        is_abandoned = all(request.cancelled or now_s > request.deadline_s for request in self._waiting)
        if is_abandoned or self._batch.is_evicted:
            raise Abandoned
        try:
            others_s = self._yield_hook(now_s - self.started_s - self.paused_s)
        except Exception as error:  # not this run's failure
            raise DeviceLost(repr(error)) from error
        if others_s:
            self._resumed_s = self._clock()
            self.paused_s += others_s
            if len(self._pauses) < MAX_PAUSES:
                self._pauses.append((self._resumed_s - others_s, self._resumed_s))

    def complete(self) -> None:
        """The computation has returned: wait for the device."""
        if self._queue is not None:
            self._queue.synchronize()
        self._end_slice(self._clock())

    def close(self) -> None:
        """The run has ended, successfully or not: read its energy."""
        if self._energy is not None:
            self.joules = self._energy.end()

    def record(self, *, is_failed: bool) -> RunRecord:
        """The run as its span shows it."""
        return RunRecord(
            self.started_s, self._clock(), tuple(self._pauses), self.paused_s, len(self._waiting), is_failed
        )

    def _end_slice(self, now_s: float) -> None:
        self.slice_s = max(self.slice_s, now_s - self._resumed_s)
        self._resumed_s = now_s
