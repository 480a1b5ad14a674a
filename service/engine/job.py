"""A request in the queue, and what its run gives back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.core.answer import Answer
from service.core.options import Priority
from service.core.request import Request
from service.core.run import RunStats
from service.engine.workloads.base import Outcome, PlannedWork, Workload
from service.errors import FarsightError, Kind
from service.telemetry.request_record import RequestRecord

if TYPE_CHECKING:
    from service.billing.metering import Accepted


class AnswerSink:
    """Where the one answer of a request goes: the event loop that awaits `answer`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Answer] = self._loop.create_future()

    @property
    def is_done(self) -> bool:
        """Answered, or its caller left, or its loop has ended."""
        return self.answer.done() or self._loop.is_closed()

    def put(self, answer: Answer) -> None:
        self.answer.set_result(answer)

    def fail(self, error: FarsightError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` on the event loop, from any thread; a loop that has ended has no caller waiting."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that is planned and ready to wait. Times are on the engine's clock."""

    workload: Workload[Any, Any]
    work: PlannedWork[Any]
    label: str  # the model's name as a metric label
    arrived_s: float  # first byte received
    queued_s: float  # parsed, planned, ready to wait
    deadline_s: float


@dataclass(slots=True, eq=False)
class Job:
    """A planned request in the queue. The device thread reads `cancelled` and sets `has_begun`; the rest belongs to the
    event loop."""

    planned: PlannedRequest
    sink: AnswerSink
    accepted: Accepted | None = None  # None: there is no ledger
    record: RequestRecord | None = None
    answered: Outcome | None = None  # only of an audit: what the request was answered
    cancelled: bool = False
    has_begun: bool = False  # the device will report its end, even if no caller is left
    failed_as: Kind | None = None  # why its caller has been answered already
    is_settled: bool = False

    # read by the scheduler at every step, so kept here: of the planned request
    work: PlannedWork[Any] = field(init=False)
    request: Request = field(init=False)
    key: Hashable = field(init=False)
    arrived_s: float = field(init=False)
    deadline_s: float = field(init=False)
    predicted_s: float = field(init=False)
    shared_s: float = field(init=False)
    peak_bytes: int = field(init=False)
    priority: Priority = field(init=False)
    tenant: str = field(init=False)

    def __post_init__(self) -> None:
        planned = self.planned
        self.work, self.request, self.key = planned.work, planned.work.prepared.request, planned.work.key
        self.arrived_s, self.deadline_s = planned.arrived_s, planned.deadline_s
        plan = planned.work.plan
        self.predicted_s, self.shared_s, self.peak_bytes = plan.predicted_s, plan.shared_s, plan.cost.peak_bytes
        self.priority, self.tenant = self.request.options.priority, self.request.tenant


@dataclass(frozen=True, slots=True)
class Result:
    """An outcome, or the error that replaces it, with this job's part of the runs."""

    outcome: Outcome | Exception
    stats: RunStats


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One result per job, in order."""

    results: Sequence[Result]

    @property
    def used_s(self) -> float:
        """Device seconds of all runs of the batch."""
        return sum(result.stats.device_s for result in self.results)

    @property
    def is_one_success(self) -> bool:
        """All members succeeded in one run: what was stopped took less, what was retried took more."""
        return all(
            isinstance(result.outcome, Outcome) and result.stats.batch_requests == len(self.results)
            for result in self.results
        )
