"""Jobs to the device and back: queued from the event loop, run on the device thread, reported on the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import torch

from service.core.answer import Answer
from service.device import synchronize
from service.engine.job import BatchResult, Job, Result
from service.engine.output_audit import OutputAudits
from service.engine.runner import BatchRunner
from service.engine.settlement import Settlement
from service.engine.workloads.base import Outcome
from service.errors import FarsightError, Kind
from service.planning.correction import PredictionCorrector, uncorrected
from service.scheduling.batch import Batch
from service.scheduling.device_loop import DeviceLoop
from service.scheduling.device_thread import DeviceThread, DeviceWork
from service.scheduling.scheduler import Scheduler
from service.telemetry.logging import about

logger = logging.getLogger("farsight")


class Execution:
    """Owns the device thread, and what is on its way to it or back."""

    def __init__(
        self,
        scheduler: Scheduler[Job],
        runner: BatchRunner,
        settlement: Settlement,
        corrector: PredictionCorrector,
        audits: OutputAudits,
        free_threads: Callable[[], int],
    ) -> None:
        """`free_threads`: how many threads the device may compute with now, if it is the CPU."""
        self.runner, self._settlement, self.corrector, self._audits = runner, settlement, corrector, audits
        # hooks to observe the device with: called on its thread, and on the event loop
        self.on_started: Callable[[Batch[Job]], None] | None = None
        self.on_reported: Callable[[Batch[Job]], None] | None = None
        self._metrics, self._recorder, self._scheduler = settlement.metrics, settlement.recorder, scheduler
        self._free_threads, self._threads = free_threads, 0
        self._waiting: set[Job] = set()  # for their one result
        self._done: dict[int, tuple[Batch[Job], BatchResult]] = {}  # run, and not yet reported on the event loop
        work = DeviceWork(
            run=runner.run_batch,
            on_started=self._on_started,
            on_finished=self._on_finished,
            on_death=self._on_death,
            prepare=self._use_free_threads,
            synchronize=partial(synchronize, runner.device),
        )
        loop = DeviceLoop(scheduler, runner.clock())
        self.device: DeviceThread[Job, BatchResult] = DeviceThread(loop, runner.clock, work)  # last: it starts at once

    @property
    def waiting(self) -> int:
        """Requests whose callers wait for their result."""
        return len(self._waiting)

    @property
    def is_auditing(self) -> bool:
        """An answer is being audited, or waits for it."""
        return self.device.idle_is_running or self.device.idle_waiting > 0

    async def run(self, job: Job) -> Answer:
        """Queue the job and wait for its answer, its deadline, or its caller's leaving. Raises FarsightError."""
        left_s = max(0.0, job.deadline_s - self.runner.clock())
        timer = asyncio.get_running_loop().call_later(left_s, self._expire, job)
        self._waiting.add(job)
        try:
            if not self.device.submit(job):
                raise unavailable()
            return await job.sink.answer
        finally:
            timer.cancel()
            job.cancelled = True  # if it still runs, it stops at its next checkpoint
            self._waiting.discard(job)
            self.device.discard(job)

    def close(self) -> None:
        """End the thread once what is queued has run, and report it."""
        self.device.stop()
        for key in tuple(self._done):  # the event loop that would do it may wait for us
            self._report(key)

    def _expire(self, job: Job) -> None:
        """The deadline passed: queued work never starts, running work stops at its next checkpoint."""
        job.cancelled = True
        was_queued = self.device.discard(job)
        if not job.sink.is_done:
            job.failed_as = Kind.DEADLINE
            state = "waiting in the queue" if was_queued else "running"
            job.sink.fail(self._settlement.late(job.arrived_s, state))

    # -- called by the device thread ----------------------------------------------------------------------------

    def _use_free_threads(self) -> None:
        """Threads that wait for each other at every operation must not share a core with reading of inputs."""
        threads = self._free_threads()
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def _on_started(self, batch: Batch[Job]) -> None:
        self._use_free_threads()
        for job in batch.items:
            job.has_begun = True
            if job.record is not None:
                job.record.is_running = True
        if self.on_started is not None:
            self.on_started(batch)

    def _on_finished(self, batch: Batch[Job], finished: BatchResult) -> None:
        if not batch.is_idle and finished.is_one_success:
            plans = [job.work.plan for job in batch.items]
            self.corrector.learn(*uncorrected(plans), finished.used_s)
            self._metrics.predicted(plans[0].kind, batch.predicted_s, finished.used_s)
        self._done[id(batch)] = batch, finished
        batch.items[0].sink.call_soon(self._report, id(batch))

    def _on_death(self) -> None:
        """No result will come any more: fail what waits. Ray replaces the replica."""
        for job in tuple(self._waiting):
            job.sink.call_soon(self._give_up, job)
        if self._recorder is not None:
            self._recorder.abandon()

    # -- back on the event loop ---------------------------------------------------------------------------------

    def _report(self, key: int) -> None:
        if key not in self._done:  # done by `close`
            return
        batch, finished = self._done.pop(key)
        if batch.is_idle:
            self._settlement.audited(batch.items[0], finished.results[0])
        else:
            self._report_requests(batch, finished)
        if self.on_reported is not None:
            self.on_reported(batch)

    def _report_requests(self, batch: Batch[Job], finished: BatchResult) -> None:
        for job, result in zip(batch.items, finished.results, strict=True):
            self._end(job, result)
        if isinstance(finished.results[0].outcome, Outcome):
            workload = batch.items[0].planned.workload
            workload.observe([job.work for job in batch.items], finished.used_s)
        self._metrics.batch([result.stats for result in finished.results], self._scheduler.queued_s)

    def _end(self, job: Job, result: Result) -> None:
        try:
            if self._recorder is not None and job.record is not None:
                self._recorder.ran(job.record, result.stats)
            is_answered = self._settlement.end(job, result)
            if is_answered and isinstance(result.outcome, Outcome) and result.outcome.layers:
                audit = self._audits.audit_of(job, result.outcome, self.device.idle_waiting)
                if audit is not None:
                    self.device.submit_idle(audit)
        except Exception as error:  # a bug, and not its neighbours'
            logger.error("request %s cannot be accounted", job.request.id, exc_info=error, extra=about(job.request.id))
            self._settlement.settle(job, Kind.INTERNAL, result)
            job.sink.fail(self._settlement.failure(job, error))

    def _give_up(self, job: Job) -> None:
        job.has_begun = False  # its end will not be reported
        job.sink.fail(unavailable())


def unavailable() -> FarsightError:
    """503: the device thread has ended."""
    return FarsightError(Kind.UNAVAILABLE, "the device of this replica does not respond", retry_after_s=1.0)
