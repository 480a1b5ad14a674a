"""Attention over the caller's own tensors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from service.attention import masks, weights
from service.attention.block_map import exact_map
from service.attention.dispatch import attend
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.pairs import MOST_TILES
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.config import Config
from service.core.answer import ErrorReport
from service.core.options import AttentionOptions
from service.core.plan import Plan, PlanKind
from service.core.request import AttentionRequest, AttentionShape
from service.engine.workloads.base import Checkpoint, InputCounts, MeasuredWork, Outcome, PlannedWork, Workload
from service.engine.workloads.error_bound import error_bound
from service.engine.workloads.finite_check import check_finite, is_finite
from service.errors import FarsightError, Kind
from service.planning import attention_plan, planner
from service.planning.attention_cost import map_bytes, pair_flops, returned_rows, weights_bytes
from service.planning.correction import PredictionCorrector
from service.planning.device_profile import DeviceProfile
from service.planning.planner import Candidates
from service.telemetry.request_record import RequestRecord

WIDE = 1e38  # largest number of a dtype with float32's exponents, whose sums may overflow
LARGEST_SOFTCAP = 1e38  # with log2(e) still a float32; no score is near it, so that a larger one caps nothing


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """A validated attention request and its sizes."""

    request: AttentionRequest
    shape: AttentionShape
    tokenized_s: None = None

    @property
    def counts(self) -> InputCounts:
        return InputCounts(tokens=self.shape.batch * self.shape.query_length)


Work = PlannedWork[PreparedAttention]
Attended = tuple[torch.Tensor, torch.Tensor, Outcome]  # output, lse, how they came about


class AttentionWorkload(Workload[AttentionRequest, PreparedAttention]):
    """Requests of equal sizes and options run as one call over the joined batch axis; sparse ones run alone."""

    def __init__(self, config: Config, profile: DeviceProfile, device: torch.device) -> None:
        self._config, self._profile, self._device = config, profile, device
        # the profile does not change: equal sizes and options have equal prices, but for what was learned
        self._cached_candidates = lru_cache(4096)(
            partial(attention_plan.attention_candidates, profile=profile, config=config)
        )

    async def prepare(self, request: AttentionRequest, deadline_s: float, record: RequestRecord) -> PreparedAttention:
        return PreparedAttention(request, request.shape)

    async def price(
        self, prepared: PreparedAttention, record: RequestRecord, *, everything: bool = False
    ) -> Candidates:
        return self.price_shape(prepared.shape, prepared.request.options)

    def price_shape(self, shape: AttentionShape, options: AttentionOptions) -> Candidates:
        """All three plans for these sizes."""
        if options.rows is None and options.kv_lengths is None:
            return self._cached_candidates(shape, options)
        # lists of the caller's length are not kept as cache keys
        return attention_plan.attention_candidates(shape, options, self._profile, self._config)

    def choose(self, prepared: PreparedAttention, priced: Candidates, corrector: PredictionCorrector) -> Work:
        plan = self.choose_shape(prepared.shape, prepared.request.options, priced, corrector)
        is_sparse = plan.kind is PlanKind.SPARSE
        exact_kind = planner.exact_kind(priced, corrector) if is_sparse else plan.kind
        return PlannedWork(prepared, plan, exact_kind, batch_key(prepared.request, plan))

    def choose_shape(
        self, shape: AttentionShape, options: AttentionOptions, priced: Candidates, corrector: PredictionCorrector
    ) -> Plan:
        """The plan for these sizes. Raises FarsightError if nothing fits or the weights asked for are too large."""
        self._check_weights(shape, options)
        return attention_plan.choose_attention(priced, shape, options, self._config, corrector)

    def label(self, request: AttentionRequest) -> str:
        return "attention"

    # -- on the device thread -----------------------------------------------------------------------------------

    def run(self, works: Sequence[Work], checkpoint: Checkpoint) -> list[Outcome]:
        if len(works) == 1:
            return [self._attend(works[0], works[0].prepared.request, checkpoint)]
        return self._attend_stacked(works, checkpoint)

    def with_less_memory(self, work: Work) -> Work | None:
        """Exact, block by block."""
        if work.plan.kind is PlanKind.CHUNKED:
            return None
        reason = f"{work.plan.reason}; the device ran out of memory"
        cost = work.plan.dense_cost if work.plan.kind is PlanKind.SPARSE else work.plan.cost
        plan = replace(work.plan, kind=PlanKind.CHUNKED, cost=cost, reason=reason, selection=None, epsilon=None)
        return replace(work, plan=plan)

    def measured(self, work: Work, outcome: Outcome) -> MeasuredWork:
        plan, shape = work.plan, work.prepared.shape
        more_pairs = outcome.pairs_scored - plan.cost.pairs if plan.kind is PlanKind.SPARSE else 0
        flops = plan.cost.flops + pair_flops(more_pairs, shape.head_dim, shape.value_dim)
        return MeasuredWork(outcome.pairs_scored, plan.dense_cost.pairs, flops, plan.dense_cost.flops)

    def _attend_stacked(self, works: Sequence[Work], checkpoint: Checkpoint) -> list[Outcome]:
        """Requests of one key differ in their tensors only: one call over the joined batch axis."""
        requests = [work.prepared.request for work in works]
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
        whole = self._attend(works[0], joined, checkpoint)
        parts = {name: torch.split(tensor, sizes) for name, tensor in whole.tensors.items()}
        return [
            # cloned: an answer must not keep its neighbours' memory alive
            Outcome(
                {name: part[index].clone() for name, part in parts.items()},
                work.plan,
                whole.error,
                work.plan.cost.pairs,
            )
            for index, work in enumerate(works)
        ]

    @torch.inference_mode()
    def _attend(self, work: Work, request: AttentionRequest, checkpoint: Checkpoint) -> Outcome:
        options, device = request.options, self._device
        tensors = (request.query.to(device), request.key.to(device), request.value.to(device))
        inputs = AttentionInputs(*tensors, mask_of(request, device), scoring_of(options))
        mask, scoring = inputs.mask, inputs.scoring
        out, lse, outcome = self._output(work, inputs, checkpoint)
        if may_hide_overflow(inputs, lse):  # the other exact kernel shows it
            output = attend(*inputs.tensors, PlanKind.CHUNKED, mask, scoring=scoring, checkpoint=checkpoint)
            out, lse = output.out, output.lse
        if not is_finite(out) and torch.finfo(out.dtype).max >= WIDE:
            out, lse, outcome = self._scaled_output(work, inputs, checkpoint)
        check_finite(out)
        returned: dict[str, torch.Tensor] = {}
        if "output" in options.returns:
            returned["output"] = out
        if "lse" in options.returns:
            returned["lse"] = lse
        if "block_map" in options.returns and "block_map" not in outcome.tensors:
            returned["block_map"] = exact_map(*tensors[:2], mask).octets()
        view = weights.WeightsView(options.rows, options.stage)
        if "weights" in options.returns:
            returned["weights"] = weights.attention_weights(
                *tensors[:2], mask, view, scoring=scoring, checkpoint=checkpoint
            )
        if "top_weights" in options.returns:
            returned["top_weights"], returned["top_indices"] = weights.top_weights(
                *tensors[:2], mask, view, options.top_k, scoring=scoring, checkpoint=checkpoint
            )
        returned |= outcome.tensors
        return replace(outcome, tensors={name: tensor.to("cpu") for name, tensor in returned.items()})

    def _output(self, work: Work, inputs: AttentionInputs, checkpoint: Checkpoint) -> Attended:
        if work.plan.kind is PlanKind.SPARSE:
            return self._sparse(work, inputs, checkpoint)
        kind, mask, scoring = work.plan.kind, inputs.mask, inputs.scoring
        output = attend(*inputs.tensors, kind, mask, scoring=scoring, checkpoint=checkpoint)
        return output.out, output.lse, Outcome({}, work.plan, ErrorReport(), work.plan.cost.pairs)

    def _scaled_output(self, work: Work, inputs: AttentionInputs, checkpoint: Checkpoint) -> Attended:
        """The same, where sums of values overflow and their means need not: values are a power of two smaller."""
        shift = math.ceil(math.log2(inputs.key.shape[2])) + 1
        smaller = replace(inputs, value=torch.ldexp(inputs.value, torch.tensor(-shift)).to(inputs.value.dtype))
        out, lse, outcome = self._output(work, smaller, checkpoint)
        return torch.ldexp(out, torch.tensor(shift)).to(out.dtype), lse, outcome

    def _sparse(self, work: Work, inputs: AttentionInputs, checkpoint: Checkpoint) -> Attended:
        """Sparse where that is within the caller's error, else exact."""
        plan, bound = work.plan, self._bound(work)
        mask, scoring = inputs.mask, inputs.scoring
        found = attend_with_error_bound(*inputs.tensors, mask, bound, scoring=scoring, checkpoint=checkpoint)
        if found.reason:  # a smaller epsilon, or exact after all
            selection = plan.selection if found.kind is plan.kind else None
            plan = replace(plan, kind=found.kind, reason=found.reason, selection=selection, epsilon=found.epsilon)
        drawn = {} if found.block_map is None else {"block_map": found.block_map.octets()}
        return found.out, found.lse, Outcome(drawn, plan, found.error, found.pairs_scored, found.density)

    def _bound(self, work: Work) -> ErrorBound:
        options, config = work.prepared.request.options, self._config
        return replace(
            error_bound(work, options, config, _seed(work.prepared.request.query)),
            audit_rows=options.audit_rows or config.audit_rows,
            needs_lse="lse" in options.returns,
            needs_certificate="certificate" in options.returns,
            map_tiles=MOST_TILES if "block_map" in options.returns else 0,
        )

    def _check_weights(self, shape: AttentionShape, options: AttentionOptions) -> None:
        """A weight tensor is n x n unless rows are named: refuse it before it is made."""
        rows = f"of {returned_rows(shape, options)} rows and {shape.key_length} keys"
        fewer = "name fewer rows, or ask for top_weights of fewer keys"
        found = [(name, size, rows, fewer) for name, size in weights_bytes(shape, options).items()]
        heads, limit = shape.batch * shape.heads, self._config.max_weights_bytes
        found.append(("block_map", map_bytes(shape, options), f"of {heads} heads", "ask for it with fewer heads"))
        for name, size, of, advice in found:
            if size > limit:
                raise FarsightError(
                    Kind.TOO_LARGE,
                    f"{name} {of} takes {size} bytes, over the limit of {limit} bytes; {advice}",
                    code="weights_too_large",
                    param="returns",
                )


def batch_key(request: AttentionRequest, plan: Plan) -> Hashable:
    """Equal for requests that may share one call: same sizes and options, nothing of their own but tensors."""
    options = request.options
    is_alone = (
        plan.kind is PlanKind.SPARSE
        or request.attn_mask is not None
        or bool({"weights", "top_weights", "block_map"} & set(options.returns))
    )
    if is_alone:
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
    """The mask of a request, on the device."""
    mask = masks.mask_of(request.options, request.attn_mask)
    lengths, bias = mask.kv_lengths, mask.attn_mask
    return replace(
        mask,
        kv_lengths=None if lengths is None else lengths.to(device),
        attn_mask=None if bias is None else bias.to(device),
    )


def may_hide_overflow(inputs: AttentionInputs, lse: torch.Tensor) -> bool:
    """Whether scores may be too large for float32: torch's fused kernel answers zeros for a row of NaN, with lse 0."""
    if not bool((lse == 0).any()):
        return False
    largest = [float(tensor.abs().max()) for tensor in (inputs.query, inputs.key)]
    head_dim = inputs.query.shape[3]
    return largest[0] * largest[1] * head_dim * max(1.0, inputs.scoring.scale_for(head_dim)) > WIDE


def scoring_of(options: AttentionOptions) -> Scoring:
    """Scale and softcap of a request."""
    softcap = None if options.softcap is None or options.softcap > LARGEST_SOFTCAP else options.softcap
    return Scoring(options.scale, softcap)


def _seed(query: torch.Tensor) -> int:
    """From the request's own numbers: the same request is audited on the same rows, and no caller can choose them."""
    sample = query.flatten()[:4096].contiguous().view(torch.uint8)
    return zlib.crc32(sample.numpy().tobytes())
