"""The only door: estimate, admit, plan, schedule, batch, execute, account. Both transports call `Engine.submit`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from service.billing.tenants import Tenants
from service.config import Config, ModelConfig
from service.core.answer import (
    Answer,
    Capacity,
    Timing,
    Usage,
    cost_usd,
)
from service.core.model_info import ModelInfo
from service.core.options import (
    AttentionOptions,
    EmbedOptions,
    ExplainOptions,
    HiddenOptions,
    Priority,
)
from service.core.plan import Plan, PlanKind
from service.core.request import (
    AttentionRequest,
    AttentionShape,
    ForwardRequest,
    Request,
)
from service.device import device_names, pick_device, synchronize
from service.engine.output_audit import Audit, OutputAudits, output_error
from service.engine.runner import (
    BatchRunner,
    Job,
    Outcome,
    Result,
    Stopped,
    batch_key,
    forward_key,
    tokens_of,
)
from service.errors import FarsightError, Kind, invalid, too_large
from service.models.inputs.rows import Tokenized
from service.models.loading.load import LoadSettings
from service.models.model import Model
from service.models.registry import Registry
from service.planning import forward_plan, planner
from service.planning.attention_cost import (
    attention_pairs,
    pair_flops,
    returned_rows,
    returned_weights,
    weights_bytes,
)
from service.planning.correction import PredictionCorrector, uncorrected
from service.planning.device_profile import DeviceProfile
from service.planning.forward_cost import Size
from service.planning.profile_cache import load_or_measure
from service.scheduling.admission import Admission
from service.scheduling.device_thread import Executor, Task, side_pool
from service.scheduling.scheduler import Batch, Scheduler, beneath
from service.telemetry.energy import Energy, Meter, carbon_g, meter_for
from service.telemetry.logging import about
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import RequestRecord, RequestRecorder

if TYPE_CHECKING:
    from service.billing.ledger import Ledger
    from service.billing.metering import UsageMeter

logger = logging.getLogger("farsight")

# kept of a caller's timeout for writing the answer; Serve ends the same wait with a 408 of its own
ANSWER_MARGIN_S = 0.05
INLINE_ROWS = 64  # of a forward request that is priced on the event loop
MAX_TIMEOUT_S = 86_400.0  # event loops have no timers for longer than some weeks


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would cost, by plan; nothing has run."""

    candidates: Mapping[PlanKind, planner.Candidate]
    chosen: PlanKind | None
    reason: str
    queue_s: float
    would_admit: bool
    retry_after_s: float | None = None


class Engine:
    """One device's queue, models and accounts: on the event loop, but for what the device thread does."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        profile: DeviceProfile,
        models: Registry,
        device: torch.device,
        cpu_threads: int,
        clock: Callable[[], float] = time.perf_counter,
        bank: Ledger | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`bank`: where there is one, requests are paid for and written down. ValueError: a setting cannot be used."""
        self.config = config
        self.tenants = metrics.tenants = Tenants(config)
        self.hour_usd = config.hour_usd(*device_names(device))
        self.metrics = metrics
        self.trails = RequestRecorder.of(config, clock, self.hour_usd)
        self.energy = None if meter is None else Energy(meter)
        self.profile = profile
        self.admission = Admission(config)
        self.models = models
        self._clock = clock
        self._device = device
        # the profile does not change, so equal sizes and options have equal prices but for what is learned
        self._cached_candidates = lru_cache(4096)(partial(planner.candidates, profile=profile, config=config))
        self._scheduler: Scheduler[Job] = Scheduler(
            config.batch_budget_s,
            max_wait_s=config.max_queue_s,
            max_bytes=planner.max_peak_bytes(profile, config),
            tenant_weights=self.tenants.weights,
            order=config.order,
        )
        self._runner = BatchRunner(config, device, clock, self._between, self.energy)
        self._stack: list[Batch[Job]] = []  # on the device: each waits for the next one
        self._workers = side_pool(2, "parse")
        self._decoders = side_pool(1, "decode")
        self._loader = side_pool(1, "load")  # of its own: a model that loads does not take the parsers' time
        # fastest pass seen of each model: no pass can have a fixed part that is longer, whatever was measured at load
        self._fastest_s: dict[ModelInfo, float] = {}  # by what was measured: a reloaded model begins anew
        self._audits = OutputAudits(config.output_audit_share)
        self._auditing: Batch[Job] | None = None
        self._pace = PredictionCorrector()
        self._started_s = clock()
        self._used_s = self._idle_s = 0.0  # of the device: by runs that have ended; by nobody, at the last look
        self._worked_s = self._told_s = 0.0  # of the device; and when `busy_share` was told
        self._asked_s = clock()
        self._lost = False  # the device answers no more
        self._waiting: set[Job] = set()  # for their one result
        self._done: dict[int, tuple[list[Job], list[Result]]] = {}  # by the device, and not told to the loop yet
        # last: its thread takes work at once. Its condition guards the scheduler, the stack and the audits
        self._executor = Executor(cpu_threads, self._next, self._died)
        self.books: UsageMeter | None = None
        if bank is not None:
            from service.billing.metering import UsageMeter

            self.books = UsageMeter(config, self.tenants, bank, metrics, hour_usd=self.hour_usd)
            self.books.open(self.capacity)

    @classmethod
    def start(cls, config: Config, metrics: Metrics, bank: Ledger | None = None) -> Engine:
        """Load the models, measure the device, start its thread. Takes seconds; raises where a model is unusable."""
        device = pick_device(config.device)
        threads = config.cpu_threads or os.cpu_count() or 1
        torch.set_num_threads(threads)  # per thread: this one calibrates, the executor's computes
        models = Registry(LoadSettings(device, config.max_text_bytes, config.max_batch_tokens))
        models.set(config.models)
        profile = load_or_measure(device, config.cache_dir)
        return cls(config, metrics, profile, models, device, threads, bank=bank, meter=meter_for(device))

    # -- what is asked of it ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """The device thread lives, and its device answers."""
        return self._executor.alive and not self._lost

    @property
    def ready(self) -> bool:
        """The device thread lives and the required models answer; `not_ready` says what is missing."""
        return self.alive and not self.models.missing

    @property
    def not_ready(self) -> str:
        missing = "; ".join(f"model {name!r}: {reason}" for name, reason in self.models.missing.items())
        return missing if self.alive else "the device of this replica does not answer"

    def ahead_s(self) -> float:
        """Predicted device seconds of all that waits or runs."""
        with self._executor.condition:
            return self._scheduler.backlog_s(self._stack)

    def _ahead(self, predicted_s: float, priority: Priority, tenant: str) -> tuple[float, float]:
        """Predicted device seconds before a tenant's request could start, and those that are its own."""
        with self._executor.condition:
            return self._scheduler.ahead(predicted_s, priority, tenant, self._stack)

    @property
    def auditing(self) -> bool:
        """An answer is being audited, or waits for it."""
        return self._auditing is not None or len(self._audits) > 0

    def check_open(self, tenant: str) -> None:
        """Refuse a request whose body is not read yet, where the queue would not take it anyhow."""
        ahead_s, own_s = self._ahead(0.0, Priority.INTERACTIVE, tenant)
        self.admission.check_open(ahead_s if own_s else 0.0, tenant)

    def busy_share(self) -> float:
        """Share of the time since the last call that the device worked for requests."""
        now_s = self._clock()
        since_s, self._asked_s = now_s - self._asked_s, now_s
        worked_s, self._told_s = self._worked_s - self._told_s, self._worked_s
        return min(1.0, worked_s / since_s) if since_s > 0 else 0.0

    def capacity(self) -> Capacity:
        """Device seconds used and idle since the start; what runs right now is in neither yet."""
        with self._executor.condition:
            if not self._stack and self._auditing is None:
                self._idle_s = self._clock() - self._started_s - self._used_s
            return Capacity(self._used_s, self._idle_s, self.energy.idle_j if self.energy else None)

    def hold(self, size: int, held: ExitStack) -> None:
        """Count `size` body bytes as in flight until `held` is closed; refuses over the limits."""
        self.admission.take(size, self.ahead_s)
        held.callback(self.admission.give_back, size)

    def model_infos(self) -> tuple[ModelInfo, ...]:
        return self.models.infos()

    async def load_model(self, name: str) -> None:
        """Load or reload one model while the others, and the one of that name before it, go on answering."""
        self._may_change_models()
        config = self._known(name)
        # a caller who leaves stops neither the load nor what waits for it: the loader has one thread, in order
        work = asyncio.get_running_loop().run_in_executor(self._loader, self.models.load, config)
        entry = await asyncio.shield(work)
        if entry.reason:
            raise invalid(f"model {name!r} cannot be loaded: {entry.reason}", code="load_failed", param="model")

    async def unload_model(self, name: str) -> None:
        """New requests for it are refused; those that have begun end."""
        self._may_change_models()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._loader, self.models.unload, name))

    async def set_models(self, configs: Sequence[ModelConfig]) -> None:
        """Serve exactly these."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._loader, self.models.set, configs))

    def _may_change_models(self) -> None:
        if not self.config.model_control:
            raise invalid("models are changed over HTTP only where FARSIGHT_MODEL_CONTROL is true", code="no_control")
        if self.config.replicas > 1:
            raise invalid(
                f"this service has {self.config.replicas} replicas, and a request reaches one of them; change `models` "
                "in the deployment's user_config instead"
            )

    def _known(self, name: str) -> ModelConfig:
        """The configuration of a model that may be loaded by name: a caller never gives a path."""
        entry = self.models.entries().get(name)
        known = {config.name: config for config in self.config.models} | ({name: entry.config} if entry else {})
        if name in known:
            return known[name]
        repository = self.config.model_repository
        names = [one.name for one in sorted(repository.iterdir()) if one.is_dir()] if repository else []
        if repository is None or name not in names:
            there = ", ".join([*known, *names]) or "none"
            raise FarsightError(
                Kind.NOT_FOUND, f"model {name[:96]!r} is unknown; there are: {there}", code="model_not_found"
            )
        try:
            # not required: an attempt that fails must not take the service out of rotation
            return ModelConfig(name=name, path=str(repository / name), required=False)
        except ValidationError as error:
            raise invalid(f"model {name[:96]!r}: {error.errors()[0]['msg']}", param="model") from error

    async def off_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run parsing, tokenising or encoding on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    async def submit(self, request: Request, received_s: float | None = None) -> Answer:
        """The one answer of this request. Raises FarsightError; a caller that leaves cancels its work.

        `received_s` (this engine's clock) is when its first byte was here: the timeout counts from then.
        """
        endpoint = _endpoint(request)
        arrived_s = self._clock() if received_s is None else received_s
        trail = None if self.trails is None else self.trails.entered(endpoint, self._label(request), request.tenant)
        try:
            answer = await self._answer(request, arrived_s, trail)
        except FarsightError as error:
            self.metrics.failed(endpoint, self._label(request), error.kind, self._clock() - arrived_s)
            error.counted = True
            raise
        except asyncio.CancelledError:
            self.metrics.failed(endpoint, self._label(request), Kind.CANCELLED, self._clock() - arrived_s)
            raise
        self.metrics.answered(endpoint, answer, request.tenant)
        if trail is not None:
            trail.answered(answer, self._clock())
        return answer

    def estimate(self, shape: AttentionShape, options: AttentionOptions, tenant: str = "default") -> Estimate:
        """Price all plans of an attention request of this tenant."""
        priced = self._candidates(shape, options)
        try:
            self._check_weights(shape, options)
            plan = planner.choose_attention(priced, shape, options, self.config, self._pace)
        except FarsightError as error:
            priced = planner.corrected(priced, self._pace)
            return Estimate(priced, None, error.message, self.ahead_s(), would_admit=False)
        return self._estimated(priced, plan, options.priority, options.timeout_s, tenant)

    async def priced(self, request: Request) -> Estimate:
        """What this request would cost; it does not run."""
        if isinstance(request, AttentionRequest):
            return self.estimate(request.shape, request.options, request.tenant)
        return await self.estimate_forward(request)

    async def estimate_forward(self, request: ForwardRequest) -> Estimate:
        """Price all plans of a forward pass: its inputs are tokenised (on the CPU), the device is not touched."""
        model = self.models.model(request.model)
        tokenized = await self._tokenize(model, request)
        info, sizes, priced = await self._priced_forward(model, tokenized, request, everything=True)
        try:
            plan = forward_plan.choose_forward(priced, info, sizes, request, self.config, self._pace)
        except FarsightError as error:
            priced = planner.corrected(priced, self._pace)
            return Estimate(priced, None, error.message, self.ahead_s(), would_admit=False)
        options = request.options
        return self._estimated(priced, plan, options.priority, options.timeout_s, request.tenant)

    def _estimated(
        self,
        priced: Mapping[PlanKind, planner.Candidate],
        plan: Plan,
        priority: Priority,
        timeout_s: float | None,
        tenant: str,
    ) -> Estimate:
        priced = planner.corrected(priced, self._pace)
        ahead_s, own_s = self._ahead(plan.predicted_s, priority, tenant)
        try:
            queue = tenant, priority, self._scheduler.is_long(plan.predicted_s)
            timeout_s = self._timeout_s(timeout_s)
            self.admission.admit(plan.predicted_s, ahead_s, timeout_s, queue=queue, own_s=own_s, asks_only=True)
            if self.books is not None:
                self.books.check(self.tenants.named(tenant), plan)
        except FarsightError as error:
            return Estimate(priced, plan.kind, error.message, ahead_s, False, error.retry_after_s)
        return Estimate(priced, plan.kind, plan.reason, ahead_s, would_admit=True)

    def close(self) -> None:
        """End the threads once what is queued on them has run; later requests are refused as unavailable."""
        self._executor.stop()
        for key in tuple(self._done):  # the loop that would do it may wait for us
            self._finished(key)
        if self.books is not None:
            self.books.close()
        self._workers.shutdown()
        self._decoders.shutdown()
        self._loader.shutdown()
        if self.trails is not None:
            self.trails.close()

    # -- the way of one request ---------------------------------------------------------------------------------

    async def _answer(self, request: Request, arrived_s: float, trail: RequestRecord | None) -> Answer:
        if not self.alive:
            raise _unavailable()
        timeout_s = self._timeout_s(request.options.timeout_s)
        job = await self._job(request, arrived_s, arrived_s + timeout_s)
        if trail is not None:
            job.trail, trail.plan, trail.planned_s = trail, job.plan, job.queued_s
        self._admit(job, timeout_s)
        if self.books is not None:
            await self._accept(job, self.books)
        if trail is not None:
            trail.admitted_s = self._clock()
        try:
            if self._clock() - job.queued_s > ANSWER_MARGIN_S:  # the bank was asked, and others came meanwhile
                self._admit(job, timeout_s)
            return await self._run(job)
        except FarsightError as error:
            self._left(job, error.kind)
            raise
        except asyncio.CancelledError:
            self._left(job, Kind.CANCELLED)
            raise

    def _admit(self, job: Job, timeout_s: float) -> None:
        ahead_s, own_s = self._ahead(job.predicted_s, job.priority, job.tenant)
        queue = job.tenant, job.priority, self._scheduler.is_long(job.predicted_s)
        spent_s = self._clock() - job.arrived_s
        self.admission.admit(job.predicted_s, ahead_s, timeout_s, spent_s, queue=queue, own_s=own_s)

    async def _accept(self, job: Job, books: UsageMeter) -> None:
        """Reserve and write down; as long as the caller waits, at most."""
        request = job.request
        tenant, label = self.tenants.named(request.tenant), self._label(request)
        try:
            async with asyncio.timeout(max(0.0, job.deadline_s - self._clock())):
                job.accepted = await books.accept(tenant, request.id, _endpoint(request), label, job.plan)
        except TimeoutError:
            raise self._late(job, "asking for the budget") from None

    def _left(self, job: Job, kind: Kind) -> None:
        """A request ends without an answer. One that runs is settled when it has stopped: it used the device."""
        if not job.has_begun:
            self._settle(job, kind)
        elif not job.is_settled:
            job.failed_as = kind

    async def _job(self, request: Request, arrived_s: float, deadline_s: float) -> Job:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if isinstance(request, AttentionRequest):
            shape = request.shape
            self._check_weights(shape, request.options)
            priced = self._candidates(shape, request.options)
            plan = planner.choose_attention(priced, shape, request.options, self.config, self._pace)
            exact = planner.exact_kind(priced, self._pace) if plan.kind is PlanKind.SPARSE else plan.kind
            key = batch_key(request, plan)
            return Job(request, plan, key, arrived_s, self._clock(), deadline_s, future, exact_kind=exact)
        model = self.models.model(request.model)
        tokenized = await self._tokenize(model, request, deadline_s)
        if self.trails is not None:
            self.trails.tokenized()
        info, sizes, priced = await self._priced_forward(model, tokenized, request)
        plan = forward_plan.choose_forward(priced, info, sizes, request, self.config, self._pace)
        key, queued_s = forward_key(request, plan, model), self._clock()
        return Job(request, plan, key, arrived_s, queued_s, deadline_s, future, PlanKind.DENSE, model, tokenized)

    async def _run(self, job: Job) -> Answer:
        """Queue the job and wait for its answer, its deadline, or its caller's leaving."""
        timer = asyncio.get_running_loop().call_later(max(0.0, job.deadline_s - self._clock()), self._expire, job)
        with self._executor.condition:
            if not self.alive:
                raise _unavailable()
            self._scheduler.add(job)
            self._waiting.add(job)
            self._executor.wake()
        try:
            return await job.future
        finally:
            timer.cancel()
            job.cancelled = True  # stops at its next checkpoint, where it still runs
            with self._executor.condition:
                self._waiting.discard(job)
                self._scheduler.discard(job)

    def _expire(self, job: Job) -> None:
        """The deadline passed: queued work never starts, running work stops at its next checkpoint."""
        job.cancelled = True
        with self._executor.condition:
            was_queued = self._scheduler.discard(job)
        if not job.future.done():
            job.failed_as = Kind.DEADLINE
            job.future.set_exception(self._late(job, "waiting in the queue" if was_queued else "running"))

    def _late(self, job: Job, state: str) -> FarsightError:
        waited_s = self._clock() - job.arrived_s
        return FarsightError(Kind.DEADLINE, f"not finished after {waited_s:.3g} s ({state})", code="timeout")

    # -- on the device thread -----------------------------------------------------------------------------------

    def _next(self) -> Task | None:
        """What an idle device should do now."""
        if (batch := self._scheduler.next_batch(self._clock())) is not None:
            return self._enter(batch)
        if (audit := self._audits.next()) is not None:
            self._auditing = beneath(audit.job)
            return partial(self._audit, audit)
        return None

    def _enter(self, batch: Batch[Job]) -> Task:
        for job in batch.items:
            job.has_begun = True
        self._stack.append(batch)
        if self.trails is not None:
            self.trails.started(batch.items)
        return partial(self._run_batch, batch)

    def _run_batch(self, batch: Batch[Job]) -> None:
        results = self._runner.run(batch.items)
        with self._executor.condition:
            self._stack.remove(batch)
            used_s = sum(result.device_s for result in results)
            self._used_s += used_s
            self._worked_s += max(0.0, used_s - batch.used_s)
            # what was stopped took less, and what was tried again took more
            if all(isinstance(one.outcome, Outcome) and one.batch_requests == len(results) for one in results):
                self._pace.learn(*uncorrected([job.plan for job in batch.items]), used_s)
                self.metrics.predicted(batch.items[0].plan.kind, batch.predicted_s, used_s)
            self._scheduler.finished(batch, used_s)
        done = batch.items, results
        self._done[id(done)] = done
        self._hand_over(batch.items[0], self._finished, id(done))

    def _between(self, used_s: float) -> float:
        """At a checkpoint of the innermost run, which has used `used_s`: run what has more claim to the device.

        The seconds that others had it.
        """
        start_s: float | None = None
        while True:
            with self._executor.condition:
                below = [] if self._auditing is None else [self._auditing]
                if self._stack:
                    self._worked_s += max(0.0, used_s - self._stack[-1].used_s)
                    self._scheduler.served(self._stack[-1], used_s)
                batch = self._scheduler.next_batch(self._clock(), below + self._stack)
                if batch is None and not self._stack and len(self._scheduler):
                    below[0].items[0].cancelled = True  # no room beside an audit: it is let go
                task = None if batch is None else self._enter(batch)
            if task is None:
                return 0.0 if start_s is None else self._clock() - start_s
            if start_s is None:
                synchronize(self._device)  # what was enqueued is the interrupted run's time
                start_s = self._clock()
            task()

    def _audit(self, audit: Audit) -> None:
        """Run an answered request again, exactly. Whoever comes meanwhile runs first."""
        result = self._runner.run([audit.job])[0]
        with self._executor.condition:
            self._used_s += result.device_s
            self._auditing = None
        self._hand_over(audit.job, self._audited, audit, result)

    def _died(self) -> None:
        """The device thread ends: nobody waits for what will not come. Ray replaces the replica."""
        with self._executor.condition:
            self._lost = True
            left = tuple(self._waiting)
        for job in left:
            self._hand_over(job, self._give_up, job)
        if self.trails is not None:
            self.trails.give_up()

    def _hand_over(self, job: Job, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` on the event loop of `job`; a loop that has ended has nobody waiting on it."""
        with suppress(RuntimeError):
            job.future.get_loop().call_soon_threadsafe(function, *arguments)

    def _give_up(self, job: Job) -> None:
        job.has_begun = False  # nobody will tell its end
        if not job.future.done():
            job.future.set_exception(_unavailable())

    # -- back on the event loop ---------------------------------------------------------------------------------

    def _finished(self, key: int) -> None:
        if key not in self._done:  # done by `close`
            return
        jobs, results = self._done.pop(key)
        for job, result in zip(jobs, results, strict=True):
            try:
                if self.trails is not None and job.trail is not None:
                    self.trails.ran(job.trail, result)
                self._end(job, result)
            except Exception as error:  # a bug, and not of its neighbours
                logger.error("request %s cannot be accounted", job.request.id, exc_info=error)
                self._settle(job, Kind.INTERNAL, result)
                if not job.future.done():
                    job.future.set_exception(self._failure(job, error))
        if (model := jobs[0].model) is not None and isinstance(results[0].outcome, Outcome):
            took_s = sum(result.device_s for result in results)
            self._fastest_s[model.info] = min(took_s, self._fastest_s.get(model.info, took_s))
        self.metrics.batch(results, self._scheduler.queued_s)

    def _end(self, job: Job, result: Result) -> None:
        if job.future.done() or job.future.get_loop().is_closed():  # late or gone: already answered
            self._settle(job, job.failed_as or Kind.CANCELLED, result)
        elif isinstance(result.outcome, Exception):
            failure = self._failure(job, result.outcome)
            self._settle(job, failure.kind, result)
            job.future.set_exception(failure)
        else:
            answer = self._account(job, result)
            self._settle(job, None, result, answer)  # written down before the caller knows
            job.future.set_result(answer)
            if isinstance(job.request, ForwardRequest):
                self.metrics.padding.set(result.outcome.padding)
            self._consider(job, result.outcome)

    def _settle(
        self, job: Job, failure: Kind | None, result: Result | None = None, answer: Answer | None = None
    ) -> None:
        """What the request used, into the metrics and the ledger; it may have failed, or its caller left."""
        if job.is_settled:
            return
        job.is_settled = True
        device_s = result.device_s if result else 0.0
        usd = cost_usd(device_s, self.hour_usd)
        plan = answer.plan if answer else job.plan
        if result is not None:
            model = self._label(job.request)
            self.metrics.spent(model, plan.kind.value, job.tenant, device_s, usd, result.joules)
        if job.accepted is None or self.books is None:
            return
        used: dict[str, Any] = {"plan": plan.kind.value, "device_s": device_s, "cost_usd": usd}
        if result is not None:
            used["joules"] = result.joules
        if answer is not None:
            usage, error = answer.usage, answer.error
            used |= {
                "tokens": usage.tokens,
                "flops": float(usage.flops),
                "flops_dense": float(usage.flops_dense),
                "saved_usd": usage.saved_usd,
                "queue_s": answer.timing.queue_s,
                "total_s": answer.timing.total_s,
                "error_upper": error.relative_l2_upper if math.isfinite(error.relative_l2_upper) else None,
            }
        else:
            used["total_s"] = self._clock() - job.arrived_s
        self.books.settle(job.accepted, failure, **used)

    def _consider(self, job: Job, outcome: Outcome) -> None:
        with self._executor.condition:
            self._audits.consider(job, outcome)
            self._executor.wake()

    def _audited(self, audit: Audit, result: Result) -> None:
        """Compare. Its device time is nobody's request."""
        model = self._label(audit.job.request)
        self.metrics.device_seconds.labels(model, audit.job.plan.kind.value, "audit").inc(result.device_s)
        if isinstance(result.outcome, Outcome):
            measure, error = output_error(audit.answered, result.outcome.tensors)
            self.metrics.audit_output_error.labels(model, measure).observe(error)
        elif not isinstance(result.outcome, Stopped):
            request_id = audit.job.request.id
            logger.error("audit of request %s failed", request_id, exc_info=result.outcome, extra=about(request_id))

    def _failure(self, job: Job, error: Exception) -> FarsightError:
        if isinstance(error, FarsightError):
            return error
        if isinstance(error, Stopped):
            return self._late(job, "running")
        logger.error("request %s failed", job.request.id, exc_info=error, extra=about(job.request.id))
        return FarsightError(Kind.INTERNAL, f"internal error; request id {job.request.id}")

    def _account(self, job: Job, result: Result) -> Answer:
        """The measured result as the one record that every face shows."""
        outcome = result.outcome
        assert isinstance(outcome, Outcome), "bug: a failed result has no account"
        price = self.hour_usd
        work, request = job.plan.cost, job.request
        pairs_dense, flops, flops_dense, dense_s = work.pairs, work.flops, work.flops, result.device_s
        if isinstance(request, ForwardRequest) and job.plan.kind is PlanKind.SPARSE:
            width = 4 * job.model.info.head_dim if job.model else 0
            flops += width * (outcome.pairs_scored - work.pairs)
        if isinstance(request, AttentionRequest) and job.plan.kind is PlanKind.SPARSE:
            shape = request.shape
            pairs_dense = attention_pairs(shape, request.options)
            weights, _ = returned_weights(shape, request.options)
            flops_dense = pair_flops(pairs_dense, shape.head_dim, shape.value_dim) + weights
            # selection's own products are in the planned work beyond its pairs
            extra = work.flops - pair_flops(work.pairs, shape.head_dim, shape.value_dim)
            flops = extra + pair_flops(outcome.pairs_scored, shape.head_dim, shape.value_dim)
            if outcome.plan.kind is PlanKind.SPARSE:
                dense = self._candidates(shape, request.options)[PlanKind.DENSE]
                dense_s = self._pace.factor(dense.path) * dense.predicted_s
        finished_s = self._clock()
        tokenized = job.tokenized
        return Answer(
            id=request.id,
            tensors=outcome.tensors,
            plan=outcome.plan,
            error=outcome.error,
            usage=Usage(
                tokens=tokens_of(job),
                pairs_scored=outcome.pairs_scored,
                pairs_dense=pairs_dense,
                flops=flops,
                flops_dense=flops_dense,
                device_s=result.device_s,
                peak_bytes=work.peak_bytes,
                cost_usd=cost_usd(result.device_s, price),
                saved_usd=cost_usd(max(0.0, dense_s - result.device_s), price),
                truncated=tokenized.truncated if tokenized else 0,
                dropped_tokens=tokenized.dropped_tokens if tokenized else 0,
                chunks=tokenized.chunks if tokenized else 0,
                joules=result.joules,
                carbon_g=carbon_g(result.joules, self.config.carbon_g_per_kwh),
            ),
            timing=Timing(
                queue_s=max(0.0, result.started_s - job.queued_s),
                device_s=result.device_s,
                total_s=finished_s - job.arrived_s,
                paused_s=result.paused_s,
            ),
            density=outcome.density,
            model=request.model if isinstance(request, ForwardRequest) else "attention",
            batch_requests=result.batch_requests,
            batch_tokens=result.batch_tokens,
            layers=outcome.layers,
            tells_layers=isinstance(request, ForwardRequest) and request.options.layer_errors,
            details=outcome.details,
        )

    # -- small rules --------------------------------------------------------------------------------------------

    def _timeout_s(self, asked_s: float | None) -> float:
        """The time until an answer must be made: what the caller waits, less the way back."""
        waits_s = self.config.default_timeout_s if asked_s is None else min(asked_s, MAX_TIMEOUT_S)
        return waits_s - min(ANSWER_MARGIN_S, 0.1 * waits_s)

    def _label(self, request: Request) -> str:
        """A model name as a metric label: only names that exist, so that callers cannot make new series."""
        if isinstance(request, AttentionRequest):
            return "attention"
        return request.model if request.model in self.models.entries() else "unknown"

    async def _tokenize(self, model: Model, request: ForwardRequest, deadline_s: float = float("inf")) -> Tokenized:
        pixels = 0 if request.pixel_values is None else len(request.pixel_values)
        count = len(request.texts) + len(request.token_ids) + len(request.pairs) + len(request.images) + pixels
        if count > self.config.max_texts:
            raise too_large("input", count, self.config.max_texts, "items", param="input")
        if len(request.images) + pixels > self.config.max_images:
            raise too_large("images", len(request.images) + pixels, self.config.max_images, "images", param="images")
        _check_task(model, request)
        # images on a thread of their own: one may take seconds, and texts must not wait for it
        workers = self._decoders if model.info.inputs == "image" else self._workers
        work = asyncio.get_running_loop().run_in_executor(workers, model.tokenize, request)
        left_s = deadline_s - self._clock()
        try:
            tokenized = await asyncio.wait_for(work, None if math.isinf(left_s) else max(0.0, left_s))
        except TimeoutError:
            raise FarsightError(Kind.DEADLINE, "not finished in time (reading the inputs)", code="timeout") from None
        assert isinstance(tokenized, Tokenized), "bug: tokenize returned something else"
        return tokenized

    async def _priced_forward(
        self, model: Model, tokenized: Tokenized, request: ForwardRequest, *, everything: bool = False
    ) -> tuple[ModelInfo, list[Size], planner.Candidates]:
        """Of a few inputs at once; thousands of lengths take tenths of a second, on a thread beside the loop."""
        price = partial(self._forward_candidates, model, tokenized, request, everything=everything)
        return await self.off_loop(price) if len(tokenized.rows) > INLINE_ROWS else price()

    def _forward_candidates(
        self, model: Model, tokenized: Tokenized, request: ForwardRequest, *, everything: bool = False
    ) -> tuple[ModelInfo, list[Size], planner.Candidates]:
        info = model.info
        sizes = [(len(row.ids) + row.patches, len(row.target or ())) for row in tokenized.rows]
        if (fastest_s := self._fastest_s.get(info, info.smallest_pass_s)) < info.smallest_pass_s:
            info = replace(info, smallest_pass_s=fastest_s)
        settings = self.profile, self.config
        return info, sizes, forward_plan.forward_candidates(info, sizes, request, *settings, everything=everything)

    def _candidates(self, shape: AttentionShape, options: AttentionOptions) -> planner.Candidates:
        if options.rows is None and options.kv_lengths is None:
            return self._cached_candidates(shape, options)
        # lists of the caller's length are not kept as keys
        return planner.candidates(shape, options, self.profile, self.config)

    def _check_weights(self, shape: AttentionShape, options: AttentionOptions) -> None:
        """A weight tensor is n x n unless rows are named: refuse it before it is made."""
        rows = returned_rows(shape, options)
        for name, size in weights_bytes(shape, options).items():
            if size > self.config.max_weights_bytes:
                raise FarsightError(
                    Kind.TOO_LARGE,
                    f"{name} of {rows} rows and {shape.key_length} keys take {size} bytes, over the limit of "
                    f"{self.config.max_weights_bytes} bytes; name fewer rows, or ask for top_weights of fewer keys",
                    code="weights_too_large",
                    param="returns",
                )


def _unavailable() -> FarsightError:
    return FarsightError(Kind.UNAVAILABLE, "the device of this replica does not answer", retry_after_s=1.0)


def _endpoint(request: Request) -> str:
    """The metric label of what was asked for."""
    if isinstance(request, AttentionRequest):
        return "attention"
    return "embeddings" if request.task == "embed" else request.task


def _check_task(model: Model, request: ForwardRequest) -> None:
    """422 where the model is for something else, naming what it is for."""
    info, task = model.info, request.task
    allowed = {info.task, "hidden", "explain"} | ({"classify"} if info.task == "rerank" else set())
    if info.task == "classify" and len(info.labels) == 1:
        allowed.add("rerank")
    if info.inputs == "image":
        allowed -= {"explain"}
    if task not in allowed:
        raise invalid(
            f"model {info.name!r} is for {info.task}, not for {task}; it takes {', '.join(sorted(allowed))}",
            code="wrong_task",
            param="model",
        )
    options, layers = request.options, info.num_layers
    if isinstance(options, HiddenOptions) and not -layers - 1 <= options.layer <= layers:
        raise invalid(f"layer: expected {-layers - 1}..{layers}, got {options.layer}", param="layer")
    if isinstance(options, ExplainOptions):
        for layer in options.layers or ():
            if not -layers <= layer < layers:
                raise invalid(f"layers: {layer} is outside the {layers} layers", param="layers")
    if isinstance(options, EmbedOptions) and options.dimensions is not None and options.dimensions > info.dimensions:
        raise invalid(f"dimensions: expected 1..{info.dimensions}, got {options.dimensions}", param="dimensions")
