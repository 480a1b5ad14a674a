"""One batch on the device thread: run its members together, alone where that fails, and measure each run."""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from service.attention import attend, masks, weights
from service.attention.masks import MaskSpec
from service.attention.sparse.bounded_error import attend_with_error_bound
from service.config import Config
from service.core.answer import Answer, ErrorReport, LayerReport
from service.core.options import Priority
from service.core.plan import Plan, PlanKind
from service.core.request import AttentionRequest, ForwardRequest, Request
from service.device import (
    EnqueuedAhead,
    clear_memory,
    is_device_lost,
    is_out_of_memory,
    synchronize,
)
from service.engine.shares import shares
from service.errors import FarsightError, Kind
from service.models.hook import ForwardContext
from service.models.inputs.rows import Tokenized
from service.models.model import Model
from service.planning.planner import max_error
from service.telemetry.energy import Energy

if TYPE_CHECKING:
    from service.billing.metering import Accepted
    from service.telemetry.request_record import RequestRecord

SHORTEST_SLICE_S = 0.005  # small layers come to a checkpoint every few microseconds
MAX_PAUSES = 64  # of one run that are kept one by one

YieldHook = Callable[[float], float]


class Stopped(Exception):
    """Nobody waits for this work any more."""


@dataclass(slots=True, eq=False)
class Job:
    """A request in the queue. The device thread reads `cancelled` and sets `has_begun`; the rest is the loop's."""

    request: Request
    plan: Plan
    key: Hashable
    arrived_s: float  # when its first byte was here
    queued_s: float  # when it was parsed, planned and ready to wait
    deadline_s: float
    future: asyncio.Future[Answer]
    exact_kind: PlanKind = PlanKind.CHUNKED
    model: Model | None = None
    tokenized: Tokenized | None = None
    cancelled: bool = False
    has_begun: bool = False  # so that its end will be told, whoever still waits for it
    accepted: Accepted | None = None  # where there are books
    failed_as: Kind | None = None  # why nobody waits for it any more
    is_settled: bool = False
    trail: RequestRecord | None = None  # where somebody wants to know

    @property
    def predicted_s(self) -> float:
        return self.plan.predicted_s

    @property
    def shared_s(self) -> float:
        return self.plan.shared_s

    @property
    def priority(self) -> Priority:
        return self.request.options.priority

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def peak_bytes(self) -> int:
        return self.plan.cost.peak_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the device computed for one job."""

    tensors: Mapping[str, torch.Tensor]
    plan: Plan
    error: ErrorReport
    pairs_scored: int
    density: float | None = None
    layers: tuple[LayerReport, ...] = ()
    details: Any = None
    padding: float = 0.0  # of the pass that it was part of: positions computed for nothing, as a share of the tokens


@dataclass(frozen=True, slots=True)
class Result:
    """An outcome or the error that replaces it, with this job's share of the measured device time."""

    outcome: Outcome | Exception
    started_s: float
    device_s: float
    batch_requests: int
    batch_tokens: int
    paused_s: float = 0.0  # while it had begun, other work had the device
    slice_s: float = 0.0  # longest time between two of its checkpoints
    joules: float | None = None  # this job's share of the measured energy
    runs: tuple[RunRecord, ...] = ()  # that it was in: those that failed, then the one that answers


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run on the device, as its span shows it."""

    started_s: float
    ended_s: float
    pauses: tuple[tuple[float, float], ...]  # (start_s, end_s) of the first ones, while others had the device
    paused_s: float  # all of them
    batch_requests: int
    is_failed: bool


class DeviceLost(Exception):
    """The device answers no more; nothing of this replica can."""


class _Run:
    """One run on the device: its own time, its pauses, and its checkpoints."""

    def __init__(
        self,
        jobs: Sequence[Job],
        clock: Callable[[], float],
        between: YieldHook,
        device: torch.device,
        energy: Energy | None,
    ) -> None:
        self._jobs, self._clock, self._between, self._energy = jobs, clock, between, energy
        self._ahead = EnqueuedAhead(device)
        self._device = device
        self.started_s = self._resumed_s = clock()
        self.paused_s = self.slice_s = 0.0
        self._pauses: list[tuple[float, float]] = []
        self._has_begun = False
        self.joules: float | None = None
        if energy is not None:
            energy.begin()

    @property
    def used_s(self) -> float:
        return self._clock() - self.started_s - self.paused_s

    def checkpoint(self) -> None:
        """Called by whatever computes, every few milliseconds or more often: stops what nobody waits for, lets others
        run."""
        now_s = self._clock()
        if now_s - self._resumed_s < SHORTEST_SLICE_S and self._has_begun:
            return
        self._has_begun = True
        self._ahead.mark()
        now_s = self._clock()  # on a GPU a mark may wait
        self._ends_slice(now_s)
        if all(job.cancelled or now_s > job.deadline_s for job in self._jobs):
            raise Stopped
        try:
            others_s = self._between(now_s - self.started_s - self.paused_s)
        except Exception as error:  # not this run's failure
            raise DeviceLost(repr(error)) from error
        if others_s:
            self._resumed_s = self._clock()
            self.paused_s += others_s
            if len(self._pauses) < MAX_PAUSES:
                self._pauses.append((self._resumed_s - others_s, self._resumed_s))

    def end(self) -> None:
        synchronize(self._device)
        self._ends_slice(self._clock())

    def settle(self) -> None:
        """It has ended, one way or the other: what its energy was."""
        if self._energy is not None:
            self.joules = self._energy.end()

    def ran(self, *, is_failed: bool) -> RunRecord:
        return RunRecord(self.started_s, self._clock(), tuple(self._pauses), self.paused_s, len(self._jobs), is_failed)

    def _ends_slice(self, now_s: float) -> None:
        self.slice_s = max(self.slice_s, now_s - self._resumed_s)
        self._resumed_s = now_s


class BatchRunner:
    """Knows how to compute jobs; lives on the device thread.

    `between` is called at checkpoints with the seconds that the run has used; it may run other work, and says how long.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        between: YieldHook = lambda _: 0.0,
        energy: Energy | None = None,
    ) -> None:
        self._config = config
        self._energy = energy
        self._device = device
        self._clock = clock
        self._between = between

    def run(self, jobs: Sequence[Job], owners: Sequence[Job] = ()) -> list[Result]:
        """One result per job, in order. A failing batch is retried member by member: only the guilty one fails.

        The time of a failed joint attempt belongs to those that then fail; where none does, to all. `owners`: who wait
        for it, where `jobs` are others in their place. Raises DeviceLost.
        """
        run = _Run(owners or jobs, self._clock, self._between, self._device, self._energy)
        try:
            outcomes = self._compute(jobs, run.checkpoint)
            run.end()
            run.settle()
        except Exception as error:
            run.settle()
            if isinstance(error, DeviceLost) or is_device_lost(error):
                raise DeviceLost(str(error)) from error
            failure = error
        else:
            return self._answered(jobs, run, outcomes)
        # after the block: within it the traceback would keep every tensor of the failed attempt
        return self._failed(jobs, run, failure)

    def _failed(self, jobs: Sequence[Job], run: _Run, error: Exception) -> list[Result]:
        used_s, is_memory, ran = run.used_s, is_out_of_memory(error), run.ran(is_failed=True)
        if is_memory:
            error = FarsightError(
                Kind.OUT_OF_MEMORY, f"the device ran out of memory; predicted peak was {jobs[0].peak_bytes} bytes"
            )
            clear_memory(self._device)
        if len(jobs) > 1 and not isinstance(error, Stopped):
            return _with_attempt(ran, used_s, run.joules, [self.run([job])[0] for job in jobs])
        if is_memory and (smaller := _with_less_memory(jobs[0])) is not None:
            return _with_attempt(ran, used_s, run.joules, self.run([smaller], jobs))
        parts, joules = shares(used_s, [job.plan.cost.flops for job in jobs]), _energy_shares(run.joules, jobs)
        told = len(jobs), 0, run.paused_s, run.slice_s
        return [
            Result(error, run.started_s, part_s, *told, part_j, (ran,))
            for part_s, part_j in zip(parts, joules, strict=True)
        ]

    def _answered(self, jobs: Sequence[Job], run: _Run, outcomes: Sequence[Outcome]) -> list[Result]:
        parts = shares(run.used_s, [job.plan.cost.flops for job in jobs])
        tokens = sum(tokens_of(job) for job in jobs)
        told = len(jobs), tokens, run.paused_s, run.slice_s
        joules, runs = _energy_shares(run.joules, jobs), (run.ran(is_failed=False),)
        return [
            Result(outcome, run.started_s, part_s, *told, part_j, runs)
            for outcome, part_s, part_j in zip(outcomes, parts, joules, strict=True)
        ]

    def _compute(self, jobs: Sequence[Job], checkpoint: Callable[[], None]) -> list[Outcome]:
        checkpoint()
        if isinstance(jobs[0].request, ForwardRequest):
            return self._forward(jobs, checkpoint)
        if len(jobs) == 1:
            return [self._attend(jobs[0], jobs[0].request, checkpoint)]
        return self._attend_stacked(jobs, checkpoint)

    def _attend_stacked(self, jobs: Sequence[Job], checkpoint: Callable[[], None]) -> list[Outcome]:
        """Requests of one key differ in their tensors only: one call over the joined batch axis."""
        requests = [attention_request(job) for job in jobs]
        first = requests[0]
        sizes = [request.query.shape[0] for request in requests]
        lengths: tuple[int, ...] | None = None
        if any(request.options.kv_lengths for request in requests):
            full = first.key.shape[2]
            lengths = sum((r.options.kv_lengths or (full,) * r.key.shape[0] for r in requests), ())
        joined = replace(
            first,
            query=torch.cat([request.query for request in requests]),
            key=torch.cat([request.key for request in requests]),
            value=torch.cat([request.value for request in requests]),
            options=first.options.model_copy(update={"kv_lengths": lengths}),
        )
        whole = self._attend(jobs[0], joined, checkpoint)
        parts = {name: torch.split(tensor, sizes) for name, tensor in whole.tensors.items()}
        return [
            # cloned: an answer must not keep its neighbours' memory alive
            Outcome(
                {name: part[index].clone() for name, part in parts.items()}, job.plan, whole.error, job.plan.cost.pairs
            )
            for index, job in enumerate(jobs)
        ]

    @torch.inference_mode()
    def _attend(self, job: Job, request: Request, checkpoint: Callable[[], None]) -> Outcome:
        assert isinstance(request, AttentionRequest), "bug: not an attention request"
        options, device = request.options, self._device
        query, key, value = (tensor.to(device) for tensor in (request.query, request.key, request.value))
        mask = mask_of(request, device)
        if job.plan.kind is PlanKind.SPARSE:
            computed = self._sparse(job, request, (query, key, value), mask, checkpoint)
        else:
            output = attend(
                query, key, value, job.plan, mask, scale=options.scale, softcap=options.softcap, checkpoint=checkpoint
            )
            computed = output.out, output.lse, Outcome({}, job.plan, ErrorReport(), job.plan.cost.pairs)
        out, lse, outcome = computed
        _check_finite(out)
        tensors: dict[str, torch.Tensor] = {}
        if "output" in options.returns:
            tensors["output"] = out
        if "lse" in options.returns:
            tensors["lse"] = lse
        if "weights" in options.returns:
            tensors["weights"] = weights.attention_weights(
                query,
                key,
                mask,
                options.rows,
                stage=options.stage,
                scale=options.scale,
                softcap=options.softcap,
                checkpoint=checkpoint,
            )
        if "top_weights" in options.returns:
            tensors["top_weights"], tensors["top_indices"] = weights.top_weights(
                query,
                key,
                mask,
                options.rows,
                options.top_k,
                stage=options.stage,
                scale=options.scale,
                softcap=options.softcap,
                checkpoint=checkpoint,
            )
        return replace(outcome, tensors={name: tensor.to("cpu") for name, tensor in tensors.items()})

    def _sparse(
        self,
        job: Job,
        request: AttentionRequest,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: MaskSpec,
        checkpoint: Callable[[], None],
    ) -> tuple[torch.Tensor, torch.Tensor, Outcome]:
        """(output, lse, how they came about): sparse where that is within the caller's error, else exact."""
        options, plan = request.options, job.plan
        checked = attend_with_error_bound(
            *tensors,
            plan,
            mask,
            scale=options.scale,
            softcap=options.softcap,
            max_error=max_error(options, self._config),
            audit_rows=options.audit_rows or self._config.audit_rows,
            seed=_seed(request.query),
            forced=options.mode == "sparse",
            max_density=self._config.max_density,
            exact_kind=job.exact_kind,
            needs_lse="lse" in options.returns,
            checkpoint=checkpoint,
        )
        if checked.reason:  # a smaller epsilon, or exact after all
            selection = plan.selection if checked.kind is plan.kind else None
            plan = replace(plan, kind=checked.kind, reason=checked.reason, selection=selection, epsilon=checked.epsilon)
        return checked.out, checked.lse, Outcome({}, plan, checked.error, checked.pairs_scored, checked.density)

    def _forward(self, jobs: Sequence[Job], checkpoint: Callable[[], None]) -> list[Outcome]:
        """All rows of all jobs together, packed where the model can. A job with a sparse plan is alone."""
        model, plan = jobs[0].model, jobs[0].plan
        assert model is not None, "bug: a forward job without its model"
        checked = self._checked(jobs[0])
        history = None if checked["forced"] else model.history
        context = ForwardContext(plan, checkpoint=checkpoint, checked=checked, history=history)
        pairs = [(forward_request(job), tokenized_of(job)) for job in jobs]
        computed = model.run(pairs, context)
        layers, tokens = tuple(context.layers), sum(tokens_of(job) for job in jobs)
        padding = sum(context.positions) / tokens - 1
        outcomes = []
        for job, one in zip(jobs, computed, strict=True):
            for tensor in one.tensors.values():
                _check_finite(tensor)
            told: dict[str, Any] = {"details": one.details, "padding": padding}
            outcome = Outcome(one.tensors, job.plan, ErrorReport(), job.plan.cost.pairs, **told)
            outcomes.append(_with_layers(outcome, layers) if layers else outcome)
        return outcomes

    def _checked(self, job: Job) -> dict[str, Any]:
        """What `attend_with_error_bound` is called with at every layer of a sparse pass."""
        request = forward_request(job)
        return {
            "max_error": max_error(request.options, self._config),
            "audit_rows": self._config.audit_rows,
            "seed": zlib.crc32(repr(tokenized_of(job).rows[0].ids[:4096]).encode()),
            "forced": request.options.mode == "sparse",
            "max_density": self._config.max_density,
            "exact_kind": job.exact_kind,
        }


def _with_attempt(ran: RunRecord, seconds: float, joules: float | None, results: list[Result]) -> list[Result]:
    """A failed attempt: shown to all that were in it, paid by those who failed again, or by all."""
    failed = [isinstance(result.outcome, Exception) for result in results]
    count = sum(failed) or len(results)
    with_attempt = []
    for one, fails in zip(results, failed, strict=True):
        if fails or not any(failed):
            used_j = None if joules is None or one.joules is None else one.joules + joules / count
            one = replace(one, device_s=one.device_s + seconds / count, joules=used_j)
        with_attempt.append(replace(one, runs=(ran, *one.runs)))
    return with_attempt


def _energy_shares(joules: float | None, jobs: Sequence[Job]) -> Sequence[float | None]:
    return [None] * len(jobs) if joules is None else shares(joules, [job.plan.cost.flops for job in jobs])


def _with_less_memory(job: Job) -> Job | None:
    """The same work in smaller pieces: attention exact, by blocks; forwards by fewer tokens. None: there are none."""
    if isinstance(job.request, AttentionRequest):
        if job.plan.kind is PlanKind.CHUNKED:
            return None
        reason = f"{job.plan.reason}; the device ran out of memory"
        plan = replace(job.plan, kind=PlanKind.CHUNKED, reason=reason, selection=None, epsilon=None)
        return replace(job, plan=plan)
    assert job.model is not None, "bug: a forward job without its model"
    longest = max((len(row) for row in tokenized_of(job).rows), default=0)
    tokens = min(job.model.max_batch_tokens, tokens_of(job)) // 2
    if tokens < longest:
        return None
    return replace(job, model=replace(job.model, max_batch_tokens=tokens))


def _with_layers(outcome: Outcome, layers: tuple[LayerReport, ...]) -> Outcome:
    """A sparse pass told as one: the error of its worst layer, and the pairs of all."""
    measured = [layer.error for layer in layers if layer.error.kind != "exact"]
    sparse = [layer.density for layer in layers if layer.density is not None]
    fallbacks = sum(layer.error.fallback for layer in layers)
    error = max(measured, key=lambda one: one.relative_l2_upper, default=ErrorReport())
    plan = outcome.plan
    if not sparse:
        plan = replace(plan, kind=layers[-1].kind, reason=f"{plan.reason}; every layer was computed exactly")
    elif fallbacks or len(sparse) < len(layers):
        plan = replace(plan, reason=f"{plan.reason}; {len(sparse)} of {len(layers)} attention calls were sparse")
    return replace(
        outcome,
        plan=plan,
        error=replace(error, fallback=fallbacks > 0),
        pairs_scored=sum(layer.pairs_scored for layer in layers),
        density=sum(sparse) / len(sparse) if sparse else None,
        layers=layers,
    )


def attention_request(job: Job) -> AttentionRequest:
    assert isinstance(job.request, AttentionRequest), "bug: not an attention request"
    return job.request


def forward_request(job: Job) -> ForwardRequest:
    assert isinstance(job.request, ForwardRequest), "bug: not a forward request"
    return job.request


def tokenized_of(job: Job) -> Tokenized:
    assert job.tokenized is not None, "bug: a forward job without its rows"
    return job.tokenized


def tokens_of(job: Job) -> int:
    """Tokens that a job computes: queries of attention, or all ids of a forward pass."""
    if isinstance(job.request, AttentionRequest):
        return job.request.query.shape[0] * job.request.query.shape[2]
    return sum(len(row) for row in tokenized_of(job).rows)


def forward_key(request: ForwardRequest, plan: Plan, model: Model) -> Hashable:
    """Forward requests with equal keys share one pass: same model (not only its name: it may have been reloaded) and
    task, options that change the pass alike."""
    if plan.kind is PlanKind.SPARSE or request.task in ("hidden", "explain"):
        return request.id, id(request)
    settled = request.options.model_dump(exclude={"priority", "timeout_s", "truncate", "chunk_overlap", "max_error"})
    if request.task == "score":
        settled = {}  # its options are applied row by row, after the pass
    return id(model), request.task, plan.kind, tuple(sorted(settled.items()))


def batch_key(request: AttentionRequest, plan: Plan) -> Hashable:
    """Requests with equal keys may share one call: same sizes, same options, nothing of their own but tensors."""
    options = request.options
    alone = (
        plan.kind is PlanKind.SPARSE
        or request.attn_mask is not None
        or "weights" in options.returns
        or "top_weights" in options.returns
    )
    if alone:
        return request.id, id(request)
    return (
        plan.kind,
        request.query.dtype,
        request.query.shape[1:],
        request.key.shape[1:],
        request.value.shape[3],
        options.is_causal,
        options.causal_alignment,
        options.window,
        options.scale,
        options.softcap,
        options.returns,
    )


def mask_of(request: AttentionRequest, device: torch.device) -> MaskSpec:
    mask = masks.mask_of(request.options, request.attn_mask)
    lengths, bias = mask.kv_lengths, mask.attn_mask
    return replace(
        mask,
        kv_lengths=None if lengths is None else lengths.to(device),
        attn_mask=None if bias is None else bias.to(device),
    )


def _check_finite(out: torch.Tensor) -> None:
    """Finite inputs may still overflow on the way; NaN is never handed out as an answer."""
    if not out.numel() or not out.is_floating_point():
        return
    if not all(math.isfinite(bound) for bound in torch.aminmax(out)):
        raise FarsightError(
            Kind.INVALID,
            "the output is not finite: scores (query, key, scale, softcap) or values overflow their type",
            code="non_finite",
        )


def _seed(query: torch.Tensor) -> int:
    """Of the request's own numbers: the same request is audited on the same rows, nobody can pick them."""
    sample = query.flatten()[:4096].contiguous().view(torch.uint8)
    return zlib.crc32(sample.numpy().tobytes())
