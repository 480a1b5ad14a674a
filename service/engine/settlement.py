"""The end of a request: its result becomes one answer, one usage record and one row of the ledger, exactly once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.billing.tenants import Tenants
from service.config import Config
from service.core.answer import Answer, Timing, Usage, cost_usd
from service.core.host_work import HostUse
from service.core.plan import PlanKind
from service.engine.job import Job, Result
from service.engine.output_audit import output_error, state_error
from service.engine.workloads.base import Outcome
from service.errors import FarsightError, Kind, internal_error
from service.scheduling.preemption import Abandoned
from service.telemetry.energy import carbon_g
from service.telemetry.logging import about
from service.telemetry.metrics import Metrics
from service.telemetry.recorder import RequestRecorder

if TYPE_CHECKING:
    from service.billing.metering import UsageMeter

logger = logging.getLogger("farsight")


@dataclass(frozen=True, slots=True)
class Accounts:
    """Where usage is reported. None: no ledger, no log lines or traces."""

    metrics: Metrics
    tenants: Tenants
    hour_usd: float
    meter: UsageMeter | None = None
    recorder: RequestRecorder | None = None


class Settlement:
    """Turns results into answers or errors, and accounts for both. On the event loop only."""

    def __init__(self, config: Config, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._config, self._accounts, self._clock = config, accounts, clock
        self.metrics, self.recorder, self._hour_usd = accounts.metrics, accounts.recorder, accounts.hour_usd

    def end(self, job: Job, result: Result) -> bool:
        """The device is done with `job`: settle it, then answer its caller. True if an answer went out."""
        if job.sink.is_done:  # late, or its caller left: answered already
            self.settle(job, job.failed_as or Kind.CANCELLED, result)
            return False
        if isinstance(result.outcome, Exception):
            failure = self.failure(job, result.outcome)
            self.settle(job, failure.kind, result)
            job.sink.fail(failure)
            return False
        answer = self._answer(job, result.outcome, result)
        self.settle(job, None, result, answer)  # recorded before the caller knows
        job.sink.put(answer)
        if result.outcome.padding is not None:
            self.metrics.padding.set(result.outcome.padding)
        return True

    def settle(
        self, job: Job, failure: Kind | None, result: Result | None = None, answer: Answer | None = None
    ) -> None:
        """Report what the request used to metrics and ledger, once; it may have failed, or its caller left."""
        if job.is_settled:
            return
        job.is_settled = True
        stats = result.stats if result else None
        device_s = stats.device_s if stats else 0.0
        host = _host(job)
        usd = cost_usd(device_s, self._hour_usd) + host.usd
        plan = (answer.plan if answer else job.work.plan).kind.value
        if stats is not None or usd:
            tenant = self._accounts.tenants.label(job.tenant)
            joules = stats.joules if stats else None
            self.metrics.spent(job.planned.label, plan, tenant, device_s, usd, joules)
        if job.accepted is None or self._accounts.meter is None:
            return
        used: dict[str, Any] = {
            "plan": plan,
            "device_s": device_s,
            "host_s": host.seconds,
            "host_usd": host.usd,
            "cost_usd": usd,
            "joules": stats.joules if stats else None,
        }
        if answer is None:
            used["total_s"] = self._clock() - job.arrived_s
        else:
            used |= _answered(answer)
        self._accounts.meter.settle(job.accepted, failure, used)

    def left(self, job: Job, kind: Kind) -> None:
        """A request ends without an answer. One that runs is settled when it has stopped: it used the device."""
        if not job.has_begun:
            self.settle(job, kind)
        elif not job.is_settled:
            job.failed_as = kind

    def audited(self, job: Job, result: Result) -> None:
        """Compare an answer with its exact run, whose device time belongs to no request."""
        assert job.answered is not None, "bug: an audit without an answer to compare"
        label, request_id = job.planned.label, job.request.id
        self.metrics.device_seconds.labels(label, job.work.plan.kind.value, "audit").inc(result.stats.device_s)
        if isinstance(result.outcome, Outcome):
            measure, error = output_error(job.answered.tensors, result.outcome.tensors)
            self.metrics.audit_output_error.labels(label, measure).observe(error)
            true, reported = state_error(job.answered, result.outcome), job.answered.error
            if true is not None and reported.scope == "last_hidden_state":
                self.metrics.audited_states(label, true, reported.relative_l2_upper)
        elif not isinstance(result.outcome, Abandoned):
            logger.error("audit of request %s failed", request_id, exc_info=result.outcome, extra=about(request_id))

    def failure(self, job: Job, error: Exception) -> FarsightError:
        """The error for the caller: the refusal itself, a deadline, or an internal error without its text."""
        if isinstance(error, FarsightError):
            return error
        if isinstance(error, Abandoned):
            return self.late(job.arrived_s, "running")
        request_id = job.request.id
        logger.error("request %s failed", request_id, exc_info=error, extra=about(request_id))
        return internal_error(request_id)

    def late(self, arrived_s: float, state: str) -> FarsightError:
        """The deadline has passed while the request was in this state."""
        waited_s = self._clock() - arrived_s
        return FarsightError(Kind.DEADLINE, f"not finished after {waited_s:.3g} s ({state})", code="timeout")

    def _answer(self, job: Job, outcome: Outcome, result: Result) -> Answer:
        """The measured result as the one record that body, headers, metrics, ledger and log line show."""
        stats, work, request = result.stats, job.work, job.request
        counts, measured = work.prepared.counts, job.planned.workload.measured(work, outcome)
        is_sparse = outcome.plan.kind is PlanKind.SPARSE
        saved_s = max(0.0, work.plan.dense_s - stats.device_s) if is_sparse else 0.0
        host = _host(job)
        return Answer(
            id=request.id,
            tensors=outcome.tensors,
            plan=outcome.plan,
            error=outcome.error,
            usage=Usage(
                tokens=counts.tokens,
                pairs_scored=measured.pairs_scored,
                pairs_dense=measured.pairs_dense,
                flops=measured.flops,
                flops_dense=measured.flops_dense,
                device_s=stats.device_s,
                peak_bytes=work.plan.cost.peak_bytes,
                cost_usd=cost_usd(stats.device_s, self._hour_usd) + host.usd,
                saved_usd=cost_usd(saved_s, self._hour_usd),
                truncated=counts.truncated,
                dropped_tokens=counts.dropped_tokens,
                chunks=counts.chunks,
                host_s=host.seconds,
                joules=stats.joules,
                carbon_g=carbon_g(stats.joules, self._config.carbon_g_per_kwh),
            ),
            timing=Timing(
                queue_s=max(0.0, stats.started_s - job.planned.queued_s),
                device_s=stats.device_s,
                total_s=self._clock() - job.arrived_s,
                paused_s=stats.paused_s,
            ),
            density=outcome.density,
            model=request.model,
            batch_requests=stats.batch_requests,
            batch_tokens=stats.batch_tokens,
            layers=outcome.layers,
            shows_layers=outcome.shows_layers,
            details=outcome.details,
        )


def _host(job: Job) -> HostUse:
    """What reading the request used."""
    record = job.record
    return HostUse(job.tenant, 0.0, 0.0) if record is None or record.host is None else record.host


def _answered(answer: Answer) -> dict[str, Any]:
    """Fields of the ledger's row that only an answer has."""
    usage, upper = answer.usage, answer.error.relative_l2_upper
    return {
        "tokens": usage.tokens,
        "flops": float(usage.flops),
        "flops_dense": float(usage.flops_dense),
        "saved_usd": usage.saved_usd,
        "queue_s": answer.timing.queue_s,
        "total_s": answer.timing.total_s,
        "error_upper": upper if math.isfinite(upper) else None,
    }
