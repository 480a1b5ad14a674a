"""Forward passes: one task of one loaded model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from service.attention.sparse.bounded_error import ErrorBound
from service.config import Config
from service.core.answer import ErrorReport, LayerReport
from service.core.host_work import HostAsk, HostKind
from service.core.model_info import ModelInfo
from service.core.options import HiddenOptions
from service.core.plan import Plan, PlanKind
from service.core.request import ForwardRequest
from service.engine.host_work import HostWork
from service.engine.workloads.allowed_tasks import check_counts, check_task
from service.engine.workloads.base import Checkpoint, InputCounts, MeasuredWork, Outcome, PlannedWork, Workload
from service.engine.workloads.error_bound import error_bound
from service.engine.workloads.finite_check import check_finite
from service.engine.workloads.reading import reading
from service.models.hook import ForwardContext
from service.models.inputs.rows import Tokenized
from service.models.model import Model
from service.models.output_budget import OutputBudget
from service.models.registry import Registry
from service.models.state_sample import StateSample
from service.planning import forward_plan
from service.planning.attention_cost import pair_flops
from service.planning.correction import PredictionCorrector
from service.planning.device_profile import DeviceProfile
from service.planning.forward_cost import STATES_ONLY, Size
from service.planning.planner import Candidates
from service.telemetry.request_record import RequestRecord

INLINE_ROWS = 64  # inputs of a request that is priced on the event loop


@dataclass(frozen=True, slots=True)
class PreparedForward:
    """A tokenised request and the model that will run it."""

    request: ForwardRequest
    model: Model
    info: ModelInfo  # the model's, with the fastest pass seen so far
    tokenized: Tokenized
    sizes: tuple[Size, ...]
    tokenized_s: float  # when tokenising was done, on the engine's clock

    @property
    def counts(self) -> InputCounts:
        tokenized = self.tokenized
        tokens = sum(len(row) for row in tokenized.rows)
        return InputCounts(tokens, tokenized.truncated, tokenized.dropped_tokens, tokenized.chunks)


Work = PlannedWork[PreparedForward]


class ForwardWorkload(Workload[ForwardRequest, PreparedForward]):
    """Requests for the same task of one model share passes; those with a sparse plan run alone."""

    def __init__(
        self, config: Config, profile: DeviceProfile, models: Registry, host: HostWork, clock: Callable[[], float]
    ) -> None:
        self._config, self._profile, self._models = config, profile, models
        self._host, self._clock = host, clock
        # fastest pass seen of each model: no pass can have a fixed part that is longer, whatever was measured at load.
        # Keyed by what was measured: a reloaded model begins anew
        self._fastest_s: dict[ModelInfo, float] = {}

    async def prepare(self, request: ForwardRequest, deadline_s: float, record: RequestRecord) -> PreparedForward:
        """The request's encoded inputs. Raises FarsightError: too many, wrong task, too long, or not in time."""
        model = self._models.model(request.model)
        check_counts(self._config, request)
        check_task(model.info, request)
        ask = reading(request, model.info, deadline_s)
        tokenized = await self._host.run(record, ask, partial(model.tokenize, request))
        sizes = tuple((len(row.ids) + row.states, len(row.target or ())) for row in tokenized.rows)
        info, fastest_s = model.info, self._fastest_s.get(model.info, math.inf)
        if fastest_s < info.smallest_pass_s:
            info = replace(info, smallest_pass_s=fastest_s)
        return PreparedForward(request, model, info, tokenized, sizes, self._clock())

    async def price(self, prepared: PreparedForward, record: RequestRecord, *, everything: bool = False) -> Candidates:
        """On a worker thread if there are thousands of lengths: that takes tenths of a second."""
        settings = prepared.info, prepared.sizes, prepared.request, self._profile, self._config
        price = partial(forward_plan.forward_candidates, *settings, everything=everything)
        if len(prepared.sizes) <= INLINE_ROWS:
            return price()
        request = prepared.request
        ask = HostAsk(HostKind.PRICE, 0, request.tenant, len(prepared.sizes), request.options.priority)
        return await self._host.run(record, ask, lambda _: price())

    def choose(self, prepared: PreparedForward, priced: Candidates, corrector: PredictionCorrector) -> Work:
        info, request = prepared.info, prepared.request
        plan = forward_plan.choose_forward(priced, info, prepared.sizes, request, self._config, corrector)
        return PlannedWork(prepared, plan, PlanKind.DENSE, batch_key(prepared, plan))

    def label(self, request: ForwardRequest) -> str:
        return request.model if request.model in self._models.entries() else "unknown"

    def observe(self, works: Sequence[Work], device_s: float) -> None:
        info = works[0].prepared.model.info
        self._fastest_s[info] = min(device_s, self._fastest_s.get(info, device_s))

    # -- on the device thread -----------------------------------------------------------------------------------

    def run(self, works: Sequence[Work], checkpoint: Checkpoint) -> list[Outcome]:
        """All rows of all works together, packed if the model can. A work with a sparse plan is alone."""
        first = works[0]
        model, is_sparse = first.prepared.model, first.plan.kind is PlanKind.SPARSE
        bound, budget = self._bound(first) if is_sparse else (None, None)
        is_sampled = first.is_audit or (is_sparse and self._config.output_audit_share > 0)
        sample = StateSample(seed_of(first)) if is_sampled else None
        context = ForwardContext(
            first.plan.kind,
            checkpoint=checkpoint,
            bound=bound,
            budget=budget,
            sample=sample,
            history=model.history if bound is not None and bound.max_density is not None else None,
        )
        computed = model.run([(work.prepared.request, work.prepared.tokenized) for work in works], context)
        layers = tuple(context.layers)
        padding = sum(context.positions) / sum(work.prepared.counts.tokens for work in works) - 1
        outcomes = []
        for work, result in zip(works, computed, strict=True):
            for tensor in result.tensors.values():
                check_finite(tensor)
            outcome = Outcome(
                result.tensors,
                work.plan,
                ErrorReport(),
                work.plan.dense_cost.pairs if is_sparse else work.plan.cost.pairs,
                details=result.details,
                padding=padding,
                shows_layers=work.prepared.request.options.layer_errors,
                sampled=() if sample is None else sample.rows,
            )
            outcomes.append(_with_layers(outcome, layers, budget) if layers else outcome)
        return outcomes

    def with_less_memory(self, work: Work) -> Work | None:
        """Passes of half as many tokens."""
        model, tokenized = work.prepared.model, work.prepared.tokenized
        longest = max((len(row) for row in tokenized.rows), default=0)
        tokens = min(model.max_batch_tokens, work.prepared.counts.tokens) // 2
        if tokens < longest:
            return None
        return replace(work, prepared=replace(work.prepared, model=replace(model, max_batch_tokens=tokens)))

    def measured(self, work: Work, outcome: Outcome) -> MeasuredWork:
        plan, width = work.plan, work.prepared.model.info.head_dim
        more_pairs = outcome.pairs_scored - plan.cost.pairs if plan.kind is PlanKind.SPARSE else 0
        flops = plan.cost.flops + pair_flops(more_pairs, width, width)
        return MeasuredWork(outcome.pairs_scored, plan.dense_cost.pairs, flops, plan.dense_cost.flops)

    # -- small rules --------------------------------------------------------------------------------------------

    def _bound(self, work: Work) -> tuple[ErrorBound, OutputBudget | None]:
        """What every attention call of a sparse pass keeps to, and if it can be known, its last hidden state."""
        options, config = work.prepared.request.options, self._config
        bound = error_bound(work, options, config, seed_of(work))
        budget = output_budget(work, bound.max_error)
        if budget is None and options.max_error is None:  # the default is that of one call
            smaller = min(bound.max_error, config.max_error)
            bound = replace(bound.for_error(smaller, smaller), aim=None)
        return bound, budget


def batch_key(prepared: PreparedForward, plan: Plan) -> Hashable:
    """Equal for the same model (not only its name: it may be reloaded), task and options that change the pass."""
    request = prepared.request
    if plan.kind is PlanKind.SPARSE or request.task in ("hidden", "explain"):
        return request.id, id(request)
    differing = request.options.model_dump(exclude={"priority", "timeout_s", "truncate", "chunk_overlap", "max_error"})
    if request.task == "score":
        differing = {}  # its options are applied row by row, after the pass
    return id(prepared.model), request.task, plan.kind, tuple(sorted(differing.items()))


def seed_of(work: Work) -> int:
    """Of the rows that are audited: from the request's own tokens, so that a repetition has the same ones."""
    return zlib.crc32(repr(work.prepared.tokenized.rows[0].ids[:4096]).encode())


def output_budget(work: Work, max_error: float) -> OutputBudget | None:
    """None if the gains of this task's attention calls are unknown, or another layer's states are its answer; then each
    call keeps to max_error."""
    info, request = work.prepared.info, work.prepared.request
    is_known = request.task in (*STATES_ONLY, "embed") or info.task_attention in (None, info.attention)
    if isinstance(request.options, HiddenOptions) and request.options.layer != -1:
        is_known = False
    return OutputBudget(info.error_gains, max_error) if info.error_gains and is_known else None


def _with_layers(outcome: Outcome, layers: tuple[LayerReport, ...], budget: OutputBudget | None) -> Outcome:
    """A sparse pass reported as one: the error of its last hidden state, or of its worst layer, and all pairs."""
    measured = [layer.error for layer in layers if layer.error.kind != "exact"]
    sparse = [layer.density for layer in layers if layer.density is not None]
    fallbacks = sum(layer.error.fallback for layer in layers)
    error = max(measured, key=lambda report: report.relative_l2_upper, default=ErrorReport())
    error = replace(error, scope="worst_layer")
    if measured and budget is not None:
        estimate, upper = budget.output_error(layers)
        error = ErrorReport("measured", scope="last_hidden_state", relative_l2=estimate, relative_l2_upper=upper)
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
