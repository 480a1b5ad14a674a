"""Host work for tenants, off the event loop: predicted, admitted, fair, paid and measured, like work of the device."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from service.attention.output import Checkpoint
from service.billing.tenants import Tenants
from service.config import Config
from service.core.answer import cost_usd
from service.core.host_work import OWED, HostAsk, HostUse
from service.device import side_pool
from service.engine.execution import unavailable
from service.errors import FarsightError, Kind
from service.planning.host_cost import HostCost
from service.scheduling.host_queue import MOST_PAUSED, HostQueue, HostTask, Slots
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import RequestRecord

if TYPE_CHECKING:
    from service.billing.budget_leases import Reservation
    from service.billing.metering import UsageMeter

Result = TypeVar("Result")

QUANTUM_S = 0.05  # after which long work lets other tenants' work run


class HostWork:
    """The threads next to the event loop and the device's, and the queue in front of them."""

    def __init__(
        self,
        config: Config,
        tenants: Tenants,
        metrics: Metrics,
        meter: UsageMeter | None,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._tenants, self._metrics = config, tenants, metrics
        self._meter, self._clock = meter, clock
        slots = Slots.of(os.cpu_count() or 1)
        self._cost, self.queue = HostCost(), HostQueue(tenants.weights, slots)
        self.threads = side_pool(slots.total + MOST_PAUSED, "host")
        self._runs: set[_Run] = set()
        self._is_closed = False

    async def run(self, record: RequestRecord, ask: HostAsk, function: Callable[[Checkpoint], Result]) -> Result:
        """What `function` returns, run on a thread when its tenant's turn comes; it calls its argument between parts.

        What it used is added to `record`, and charged at once. Raises FarsightError: OVERLOADED, DEADLINE, OVER_BUDGET,
        UNAVAILABLE (the budget cannot be checked), and what `function` raises.
        """
        run = None
        try:
            left_s = None if ask.deadline_s == math.inf else max(0.0, ask.deadline_s - self._clock())
            async with asyncio.timeout(left_s):
                predicted_s = self._cost.predicted_s(ask)
                reservation = () if ask.kind in OWED else await self._accept(record, ask, predicted_s)
                if self._is_closed:
                    raise unavailable()
                run = _Run(self, record, ask, function, reservation, predicted_s)
                self._runs.add(run)
                self.queue.put(run.task)
                self.queue.start()
                result: Result = await run.result
                return result
        except TimeoutError:
            raise FarsightError(
                Kind.DEADLINE, f"not finished in time ({ask.kind} on the host)", code="timeout"
            ) from None
        finally:
            if run is not None:
                self._leave(run)

    def charge_unanswered(self, record: RequestRecord) -> None:
        """A request ends that the device never accepted: what reading it used becomes a row of the ledger."""
        use, failed = record.host, record.failed
        if use is None or record.admitted_s is not None:
            return
        if any(run.record is record for run in self._runs):  # charged when that has ended, in one row
            return
        record.host = None
        model = record.parsed_model
        self._metrics.spent_on_host(model, self._tenants.label(use.tenant), use.usd)
        if self._meter is not None:
            total_s = self._clock() - record.received.received_s
            self._meter.settle_unaccepted(record, use, model, None if failed is None else failed.kind, total_s)

    def close(self) -> None:
        """End the threads at the next checkpoint of what runs, and settle it; its callers get UNAVAILABLE."""
        self._is_closed = True
        for run in tuple(self._runs):
            self._leave(run)
            run.go_on()
        self.threads.shutdown()
        for run in tuple(self._runs):  # what they report comes too late
            self._finish(run, run.used_s, unavailable())

    # -- before -------------------------------------------------------------------------------------------------

    def _admit(self, ask: HostAsk, predicted_s: float) -> None:
        """Raises FarsightError if too much of its tenant waits, or it cannot be done in time."""
        ahead_s, limit_s = self.queue.ahead_s(ask.tenant), self._config.max_queue_s
        if ahead_s and ahead_s + predicted_s > limit_s:
            raise FarsightError(
                Kind.OVERLOADED,
                f"{ahead_s:.3g} predicted seconds of reading inputs are queued; {predicted_s:.3g} more are over the "
                f"limit of {limit_s:g} s",
                retry_after_s=min(ahead_s, ahead_s + predicted_s - limit_s),
            )
        left_s = ask.deadline_s - self._clock()
        if predicted_s > left_s:
            raise FarsightError(
                Kind.DEADLINE,
                f"predicted to need {predicted_s:.3g} s to read its inputs, over the {max(0.0, left_s):.3g} s left of "
                "the timeout",
                code="predicted_late",
            )

    async def _accept(self, record: RequestRecord, ask: HostAsk, predicted_s: float) -> Reservation:
        """Admit, and reserve the budget. Raises FarsightError."""
        self._admit(ask, predicted_s)
        if self._meter is None:
            return ()
        usd = cost_usd(predicted_s, self._config.price_per_host_hour_usd)
        try:
            reservation = await self._meter.reserve_host(self._tenants.named(ask.tenant), usd)
        except FarsightError as error:
            if error.kind is Kind.UNAVAILABLE and record.is_dry_run:  # prices are known without the ledger
                return ()
            raise
        try:
            self._admit(ask, predicted_s)  # the ledger may have been asked, and others came meanwhile
        except FarsightError:
            self._meter.settle_host(reservation, 0.0)
            raise
        return reservation

    # -- after, on the event loop -------------------------------------------------------------------------------

    def _leave(self, run: _Run) -> None:
        """Its caller waits no longer: it never starts, or stops at its next checkpoint."""
        run.is_abandoned = True
        if not self.queue.discard(run.task):
            return
        if run.task.has_begun:
            run.go_on()  # to its end: it was paused
        else:
            self._finish(run, 0.0, unavailable())
        self._start()

    def _start(self) -> None:
        if not self._is_closed:
            self.queue.start()

    def paused(self, run: _Run, used_s: float) -> None:
        if self._is_closed or run.is_abandoned:
            run.go_on()  # to its end
            return
        self.queue.stopped(run.task, used_s)
        self.queue.put(run.task)
        self.queue.start()

    def ended(self, run: _Run, result: Any, error: BaseException | None) -> None:
        if run not in self._runs:  # finished by `close`
            return
        if self.queue.is_running(run.task):  # else it was paused when its caller left
            self.queue.stopped(run.task, run.used_s - run.task.used_s)
        self._start()
        if error is None:
            self._cost.learn(run.ask, run.used_s)
        self._finish(run, run.used_s, error, result)

    def _finish(self, run: _Run, used_s: float, error: BaseException | None, result: Any = None) -> None:
        """Charge what it used, and tell its caller, or the ledger if there is none any more."""
        self._runs.discard(run)
        try:
            self._settle(run, used_s)
        except Exception as bug:  # noqa: BLE001 (raised where it is awaited, which would else wait forever)
            error = bug
        run.report(result, error)
        if run.is_abandoned and used_s:  # the request has ended before
            self.charge_unanswered(run.record)

    def _settle(self, run: _Run, used_s: float) -> None:
        """Charge what it used, and add it to its request."""
        is_paid = run.ask.kind not in OWED
        usd = cost_usd(used_s, self._config.price_per_host_hour_usd) if is_paid else 0.0
        if self._meter is not None:
            self._meter.settle_host(run.reservation, usd)
        if used_s:
            tenant, before = run.ask.tenant, run.record.host
            self._metrics.host_used(run.ask.kind.value, self._tenants.label(tenant), used_s)
            if is_paid:
                spent = (used_s, usd) if before is None else (before.seconds + used_s, before.usd + usd)
                run.record.host = HostUse(tenant, *spent)


class _Run:
    """One piece of work, between the event loop and its thread."""

    def __init__(
        self,
        host: HostWork,
        record: RequestRecord,
        ask: HostAsk,
        function: Callable[[Checkpoint], Any],
        reservation: Reservation,
        predicted_s: float,
    ) -> None:
        self.record, self.ask, self.reservation = record, ask, reservation
        self._host, self._function = host, function
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()
        self.is_abandoned = False  # its caller left, or its time is over
        self._may_go_on = threading.Event()
        self._began_s = 0.0  # by the thread's own clock
        self._resumed_s = 0.0
        self.used_s = 0.0  # of the thread so far
        self.task = HostTask(ask.kind, ask.tenant, ask.priority, predicted_s, self._begin)

    def go_on(self) -> None:
        """After a pause."""
        self._may_go_on.set()

    def report(self, result: Any, error: BaseException | None) -> None:
        """To its caller, if one waits; from the event loop, or from any thread while the service ends."""

        def set_result() -> None:
            if self.result.done():
                return
            if error is None:
                self.result.set_result(result)
            else:
                self.result.set_exception(error)

        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            set_result()
            return
        with suppress(RuntimeError):  # the loop has ended, and nothing waits
            self._loop.call_soon_threadsafe(set_result)

    def _begin(self) -> None:
        if self.task.has_begun:
            self.go_on()
        else:
            self._host.threads.submit(self._run)

    # -- on its thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._began_s = self._resumed_s = time.thread_time()
        result, error = None, None
        try:
            result = self._function(self._checkpoint)
        except BaseException as raised:  # noqa: BLE001 (raised again where it is awaited)
            error = raised
        self.used_s = time.thread_time() - self._began_s
        self._call_soon(self._host.ended, result, error)

    def _checkpoint(self) -> None:
        """Between two parts of the work. Raises FarsightError if nothing waits for its result."""
        used_s = time.thread_time() - self._resumed_s
        if used_s > QUANTUM_S and self._host.queue.others_wait(self.task):
            self._may_go_on.clear()
            if not self.is_abandoned:  # looked at after the event is cleared: `close` sets both the other way round
                self._call_soon(self._host.paused, used_s)
                self._may_go_on.wait()
            self._resumed_s = time.thread_time()
        if self.is_abandoned:
            raise FarsightError(Kind.CANCELLED, "the caller left, or the time was over")

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call it on the event loop; here if that has ended, because then nothing else does."""
        try:
            self._loop.call_soon_threadsafe(partial(function, self, *arguments))
        except RuntimeError:
            function(self, *arguments)
