"""One batch on the device thread: runs its members together, one by one if that fails, and measures each run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from service.core.run import RunRecord, RunStats
from service.device import DeviceQueue, clear_memory, is_device_lost, is_out_of_memory
from service.engine.job import BatchResult, Job, Result
from service.engine.shares import shares
from service.engine.workloads.base import Outcome
from service.errors import FarsightError, Kind
from service.scheduling.batch import Batch
from service.scheduling.preemption import Abandoned, DeviceLost, DeviceRun, Evictable, RunEnvironment, YieldHook
from service.telemetry.energy import Energy


@dataclass(frozen=True, slots=True)
class _Alone:
    """A batch that nothing evicts."""

    is_evicted: bool = False


ALONE = _Alone()


def no_others(used_s: float) -> float:
    """A yield hook for a device that runs one batch only."""
    return 0.0


class BatchRunner:
    """Computes jobs through their workload; lives on the device thread."""

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter, energy: Energy | None = None
    ) -> None:
        self.device, self.clock = device, clock
        self._environment = RunEnvironment(
            clock, partial(DeviceQueue, device) if device.type == "cuda" else None, energy
        )

    def run_batch(self, batch: Batch[Job], yield_hook: YieldHook) -> BatchResult:
        """One result per job. Raises DeviceLost."""
        return BatchResult(self.run(batch.items, yield_hook, batch))

    def run(
        self,
        jobs: Sequence[Job],
        yield_hook: YieldHook = no_others,
        batch: Evictable = ALONE,
        owners: Sequence[Job] = (),
    ) -> list[Result]:
        """One result per job. A failing batch is retried member by member: only the guilty one fails.

        The time of a failed joint attempt belongs to those that fail again; if none does, to all. Raises DeviceLost.

        Args:
            jobs: of one key.
            yield_hook: called at checkpoints; lets other work run.
            batch: that the jobs are of; it may be evicted.
            owners: wait for the results, if `jobs` are smaller versions of them.
        """
        run = DeviceRun(self._environment, yield_hook, owners or jobs, batch)
        try:
            run.checkpoint()
            outcomes = jobs[0].planned.workload.run([job.work for job in jobs], run.checkpoint)
            run.complete()
            run.close()
        except Exception as error:
            run.close()
            if isinstance(error, DeviceLost) or is_device_lost(error):
                raise DeviceLost(str(error)) from error
            failure = error
        else:
            return _shared(jobs, run, outcomes)
        # after the block: within it the traceback would keep every tensor of the failed attempt
        return self._failed(jobs, run, failure, yield_hook, batch)

    def _failed(
        self,
        jobs: Sequence[Job],
        run: DeviceRun,
        error: Exception,
        yield_hook: YieldHook,
        batch: Evictable,
    ) -> list[Result]:
        used_s, is_memory, record = run.used_s, is_out_of_memory(error), run.record(is_failed=True)
        if is_memory:
            error = FarsightError(
                Kind.OUT_OF_MEMORY, f"the device ran out of memory; predicted peak was {jobs[0].peak_bytes} bytes"
            )
            clear_memory(self.device)
        if len(jobs) > 1 and not isinstance(error, Abandoned):
            retried = [self.run([job], yield_hook, batch)[0] for job in jobs]
            return _with_attempt(record, used_s, run.joules, retried)
        if is_memory and (smaller := _with_less_memory(jobs[0])) is not None:
            return _with_attempt(record, used_s, run.joules, self.run([smaller], yield_hook, batch, jobs))
        return _shared(jobs, run, [error] * len(jobs), used_s=used_s, record=record)


def _shared(
    jobs: Sequence[Job],
    run: DeviceRun,
    outcomes: Sequence[Outcome | Exception],
    *,
    used_s: float | None = None,
    record: RunRecord | None = None,
) -> list[Result]:
    """The measured run, split over its members by FLOPs. `used_s` and `record` are given for a failed run."""
    flops = [job.work.plan.cost.flops for job in jobs]
    is_failed = record is not None
    parts_s = shares(run.used_s if used_s is None else used_s, flops)
    parts_j = [None] * len(jobs) if run.joules is None else shares(run.joules, flops)
    tokens = 0 if is_failed else sum(job.work.prepared.counts.tokens for job in jobs)
    runs = (record or run.record(is_failed=False),)
    return [
        Result(
            outcome,
            RunStats(run.started_s, part_s, len(jobs), tokens, run.paused_s, run.slice_s, part_j, runs),
        )
        for outcome, part_s, part_j in zip(outcomes, parts_s, parts_j, strict=True)
    ]


def _with_attempt(record: RunRecord, seconds: float, joules: float | None, results: list[Result]) -> list[Result]:
    """A failed attempt: recorded for all that were in it, paid by those that failed again, or by all."""
    failed = [isinstance(result.outcome, Exception) for result in results]
    count = sum(failed) or len(results)
    with_attempt = []
    for result, fails in zip(results, failed, strict=True):
        stats = result.stats
        if fails or not any(failed):
            used_j = None if joules is None or stats.joules is None else stats.joules + joules / count
            stats = replace(stats, device_s=stats.device_s + seconds / count, joules=used_j)
        with_attempt.append(replace(result, stats=replace(stats, runs=(record, *stats.runs))))
    return with_attempt


def _with_less_memory(job: Job) -> Job | None:
    smaller = job.planned.workload.with_less_memory(job.work)
    return None if smaller is None else replace(job, planned=replace(job.planned, work=smaller))
