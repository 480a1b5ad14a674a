"""The door: every request, from either transport, enters by `Engine.submit` and leaves as one answer or one error."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from service.billing.tenants import Tenants
from service.config import Config, ModelConfig
from service.core.answer import Answer, Capacity
from service.core.model_info import ModelInfo
from service.core.options import AttentionOptions, Priority
from service.core.plan import Plan
from service.core.request import AttentionShape, Request
from service.device import device_names, pick_device
from service.engine.execution import Execution, unavailable
from service.engine.host_work import HostWork
from service.engine.job import AnswerSink, Job, PlannedRequest
from service.engine.output_audit import OutputAudits
from service.engine.pricing import Admitted, Estimate, Options, Pricing
from service.engine.replica import ReplicaDevice, recorder_for, usage_meter
from service.engine.runner import BatchRunner
from service.engine.settlement import Accounts, Settlement
from service.engine.workloads.attention import AttentionWorkload
from service.engine.workloads.forward import ForwardWorkload
from service.errors import FarsightError, Kind
from service.models.loading.load import LoadSettings
from service.models.manager import ModelManager
from service.models.registry import Entry, Registry
from service.planning.planner import max_peak_bytes
from service.planning.profile_cache import load_or_measure
from service.scheduling.admission import Admission
from service.scheduling.inflight_bytes import HeldBytes, InFlightBytes
from service.scheduling.scheduler import Order, Scheduler
from service.telemetry.energy import Energy, meter_for
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import Parsed, Received, RequestRecord

if TYPE_CHECKING:
    from service.billing.ledger import Ledger
    from service.billing.metering import Accepted, UsageMeter

# kept of a caller's timeout for writing the answer; Serve ends the same wait with a 408 of its own
ANSWER_MARGIN_S = 0.05
MAX_TIMEOUT_S = 86_400.0  # event loops have no timers for longer than some weeks


class Engine:
    """One device's queue, models and accounts. On the event loop; the device has a thread of its own."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        models: Registry,
        replica: ReplicaDevice,
        *,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.perf_counter,
        order: Order = "fair",
    ) -> None:
        """With a `ledger`, requests are paid for and recorded. `order` "arrival" is first in, first out, without
        preemption: to compare with, as other servers do. Raises ValueError if a setting cannot be used."""
        self.config, self.metrics, self.models, self.clock = config, metrics, models, clock
        self.profile, self.tenants = replica.profile, Tenants(config)
        self._cpu_threads = replica.cpu_threads
        self.hour_usd = config.hour_usd(*device_names(replica.device))
        self.recorder = recorder_for(config, clock, self.hour_usd)
        self.energy = None if replica.meter is None else Energy(replica.meter)
        self.meter = None if ledger is None else usage_meter(config, self.tenants, ledger, metrics, self.hour_usd)
        self.admission = Admission(config)
        self.inflight = InFlightBytes(config, self.ahead_s)
        # makes a context that counts body bytes as in flight while it is open
        self.held_bytes: Callable[[], HeldBytes] = partial(HeldBytes, self.inflight)
        self.manager = ModelManager(config, models)
        self.host = HostWork(config, self.tenants, metrics, self.meter, clock)
        self.off_loop, self.charge_unanswered = self.host.run, self.host.charge_unanswered
        self.pricing = Pricing(
            AttentionWorkload(config, replica.profile, replica.device),
            ForwardWorkload(config, replica.profile, models, self.host, clock),
            clock,
        )
        accounts = Accounts(metrics, self.tenants, self.hour_usd, self.meter, self.recorder)
        self._settlement = Settlement(config, accounts, clock)
        scheduler: Scheduler[Job] = Scheduler(
            config.batch_budget_s,
            max_wait_s=config.max_queue_s,
            max_bytes=max_peak_bytes(replica.profile, config),
            tenant_weights=self.tenants.weights,
            order=order,
        )
        runner = BatchRunner(replica.device, clock, self.energy)
        audits = OutputAudits(config.output_audit_share)
        settings = self._settlement, self.pricing.corrector, audits, self._free_threads
        self.execution = Execution(scheduler, runner, *settings)  # last: its thread takes work at once
        if self.meter is not None:
            self.meter.open(self.capacity)

    @classmethod
    def start(cls, config: Config, metrics: Metrics, ledger: Ledger | None = None, order: Order = "fair") -> Engine:
        """Load the models, measure the device, start its thread. Takes seconds; raises if a model is unusable."""
        device = pick_device(config.device)
        threads = config.cpu_threads or os.cpu_count() or 1
        torch.set_num_threads(threads)  # per thread: this one calibrates, the device thread computes
        models = Registry(LoadSettings.of(config, device))
        models.set(config.models)
        replica = ReplicaDevice(device, load_or_measure(device, config.cache_dir), threads, meter_for(device))
        return cls(config, metrics, models, replica, ledger=ledger, order=order)

    def close(self) -> None:
        """End the threads once what is queued on them has run; later requests are refused as unavailable."""
        self.execution.close()
        self.host.close()
        if self.meter is not None:
            self.meter.close()
        self.manager.close()
        if self.recorder is not None:
            self.recorder.close()

    # -- the way of one request ---------------------------------------------------------------------------------

    async def submit(self, request: Request, record: RequestRecord | None = None) -> Answer:
        """The one answer of this request. Raises FarsightError; a caller that leaves cancels its work.

        `record`: what its transport knows; the timeout counts from its first byte.
        """
        record = self._record(request, record)
        arrived_s, label = record.received.received_s, record.parsed_model
        try:
            answer = await self._answer(request, arrived_s, record)
        except FarsightError as error:
            self.metrics.failed(request.endpoint, label, error.kind, self.clock() - arrived_s)
            record.fail(error.kind, error.code)
            raise
        except asyncio.CancelledError:
            self.metrics.failed(request.endpoint, label, Kind.CANCELLED, self.clock() - arrived_s)
            raise
        self.metrics.answered(request.endpoint, answer, self.tenants.label(request.tenant))
        if self.recorder is not None:  # copied only for who reads it
            record.set_answer(answer, self.clock())
        return answer

    async def _answer(self, request: Request, arrived_s: float, record: RequestRecord) -> Answer:
        if not self.execution.device.alive:
            raise unavailable()
        timeout_s = self._timeout_s(request.options.timeout_s)
        planned = await self.pricing.plan(request, arrived_s, arrived_s + timeout_s, record)
        self._admit(planned, timeout_s)
        accepted = None if self.meter is None else await self._accept(planned, self.meter)
        job = Job(planned, AnswerSink(), accepted, record)
        record.admitted_s = self.clock()
        try:
            if self.clock() - planned.queued_s > ANSWER_MARGIN_S:  # the ledger was asked, and others came meanwhile
                self._admit(planned, timeout_s)
            return await self.execution.run(job)
        except FarsightError as error:
            self._settlement.left(job, error.kind)
            raise
        except asyncio.CancelledError:
            self._settlement.left(job, Kind.CANCELLED)
            raise

    def _admit(self, planned: PlannedRequest, timeout_s: float) -> None:
        """Raises FarsightError if the queue is full or the request would be late."""
        request, predicted_s = planned.work.prepared.request, planned.work.plan.predicted_s
        options, tenant = request.options, request.tenant
        device = self.execution.device
        ahead_s, tenant_s = device.ahead(predicted_s, options.priority, tenant)
        queue = tenant, options.priority, device.is_long(predicted_s)
        spent_s = self.clock() - planned.arrived_s
        self.admission.admit(predicted_s, ahead_s, timeout_s, spent_s, queue=queue, tenant_s=tenant_s)

    async def _accept(self, planned: PlannedRequest, meter: UsageMeter) -> Accepted:
        """Reserve the budget and record the request; waits at most as long as the caller does."""
        request, plan = planned.work.prepared.request, planned.work.plan
        tenant = self.tenants.named(request.tenant)
        try:
            async with asyncio.timeout(max(0.0, planned.deadline_s - self.clock())):
                return await meter.accept(tenant, request.id, request.endpoint, planned.label, plan)
        except TimeoutError:
            raise self._settlement.late(planned.arrived_s, "asking for the budget") from None

    def _record(self, request: Request, record: RequestRecord | None) -> RequestRecord:
        """Of a request that was parsed; a new one if it came by no transport."""
        if record is None:
            received = Received(request.id, "http", request.endpoint, request.endpoint, self.clock())
            record = RequestRecord(received)
        record.parsed = Parsed(self.pricing.workloads[type(request)].label(request), request.tenant, self.clock())
        return record

    def _timeout_s(self, asked_s: float | None) -> float:
        """The time until an answer must be made: what the caller waits, less the way back."""
        waits_s = self.config.default_timeout_s if asked_s is None else min(asked_s, MAX_TIMEOUT_S)
        return waits_s - min(ANSWER_MARGIN_S, 0.1 * waits_s)

    # -- estimates ----------------------------------------------------------------------------------------------

    async def priced(self, request: Request, record: RequestRecord | None = None) -> Estimate:
        """What this request would cost. Inputs are tokenised, and that is charged; the device is not touched."""
        record = self._record(request, record)
        record.is_dry_run = True
        deadline_s = record.received.received_s + self._timeout_s(request.options.timeout_s)
        return self._with_queue(await self.pricing.estimate(request, deadline_s, record, self._would_admit))

    def estimate(self, shape: AttentionShape, options: AttentionOptions, tenant: str = "default") -> Estimate:
        """What an attention request of these sizes would cost this tenant."""
        admits = partial(self._would_admit, options=options, tenant=tenant)
        return self._with_queue(self.pricing.estimate_shape(shape, options, admits))

    def _with_queue(self, estimate: Estimate) -> Estimate:
        """For a request without a plan: what waits in all."""
        return estimate if estimate.chosen is not None else replace(estimate, queue_s=self.ahead_s())

    def _would_admit(self, plan: Plan, options: Options, tenant: str) -> Admitted:
        device = self.execution.device
        ahead_s, tenant_s = device.ahead(plan.predicted_s, options.priority, tenant)
        queue = tenant, options.priority, device.is_long(plan.predicted_s)
        try:
            timeout_s = self._timeout_s(options.timeout_s)
            self.admission.admit(plan.predicted_s, ahead_s, timeout_s, queue=queue, tenant_s=tenant_s, asks_only=True)
            if self.meter is not None:
                self.meter.check(self.tenants.named(tenant), plan)
        except FarsightError as error:
            return ahead_s, error
        return ahead_s, None

    # -- what transports ask besides ----------------------------------------------------------------------------

    def check_open(self, tenant: str) -> None:
        """Refuse a request whose body is not read yet if the queue would not accept it anyway."""
        ahead_s, tenant_s = self.execution.device.ahead(0.0, Priority.INTERACTIVE, tenant)
        self.admission.check_open(ahead_s if tenant_s else 0.0, tenant)

    def refused(self, endpoint: str, kind: Kind) -> None:
        """Count a request that its transport refused."""
        self.metrics.refused(endpoint, kind)

    def model_infos(self) -> tuple[ModelInfo, ...]:
        return self.models.infos()

    def model_entries(self) -> Mapping[str, Entry]:
        """Every model that is known, with its state."""
        return self.models.entries()

    async def load_model(self, name: str) -> None:
        await self.manager.load(name)

    async def unload_model(self, name: str) -> None:
        await self.manager.unload(name)

    async def set_models(self, configs: Sequence[ModelConfig]) -> None:
        await self.manager.set(configs)

    async def usage(self, from_s: float, to_s: float, group_by: tuple[str, ...], tenant: str | None) -> dict[str, Any]:
        """What the ledger knows. Raises FarsightError: there is no ledger, or it does not respond."""
        if self.meter is None:
            raise FarsightError(Kind.NOT_FOUND, "this service has no ledger")
        return await self.meter.usage(from_s, to_s, group_by, tenant)

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """The device thread runs, and its device responds."""
        return self.execution.device.alive

    @property
    def ready(self) -> bool:
        """Alive, and the required models are loaded; `not_ready` says what is missing."""
        return self.alive and not self.models.missing

    @property
    def not_ready(self) -> str:
        missing = "; ".join(f"model {name!r}: {reason}" for name, reason in self.models.missing.items())
        return missing if self.alive else "the device of this replica does not respond"

    def _free_threads(self) -> int:
        """For the device, if it is the CPU: those that it has, less what reads inputs."""
        return max(1, self._cpu_threads - self.host.queue.long_running)

    def ahead_s(self) -> float:
        """Predicted device seconds of everything that waits or runs."""
        return self.execution.device.backlog_s()

    def busy_share(self) -> float:
        """Share of the time since the last call that the device worked for requests."""
        return self.execution.device.busy_share()

    def capacity(self) -> Capacity:
        """Device seconds used and idle since the start; what runs right now is in neither yet."""
        used_s, idle_s = self.execution.device.used_and_idle_s()
        return Capacity(used_s, idle_s, self.energy.idle_j if self.energy else None)
