"""The plan of a forward pass: for all of its layers the kind predicted to be fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from service.config import Config
from service.core.model_info import ModelInfo
from service.core.plan import Plan, PlanKind
from service.core.request import ForwardRequest
from service.errors import FarsightError, Kind, invalid
from service.planning.correction import PredictionCorrector, octave
from service.planning.device_profile import DeviceProfile
from service.planning.forward_cost import (
    Size,
    forward_cost,
    forward_features,
    linear_flops,
    pass_tokens,
)
from service.planning.planner import (
    EXACT_ONLY,
    Candidate,
    Candidates,
    epsilon_for,
    fastest,
    max_error,
    max_peak_bytes,
    over_limit,
    plan_of,
    seconds_by_plan,
)


def forward_candidates(
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    profile: DeviceProfile,
    config: Config,
    *,
    everything: bool = False,
) -> Candidates:
    """The plans that may be chosen for the attention of a forward pass, priced; for all of its layers the same.
    `everything`: those too that apply to the model and may not be chosen for this request."""
    limit = max_peak_bytes(profile, config)
    bound, longest = max_error(request.options, config), max(map(sum, sizes), default=0)
    arguments: dict[str, Any] = {"block_size": config.block_size, "epsilon": epsilon_for(bound, config)}
    form = request.task, octave(longest), octave(len(sizes))
    passes = len(pass_tokens(model, sizes, config.max_batch_tokens))
    linear = linear_flops(model, sizes, request, passes)
    rest_s = profile.forward_s(linear, model.dtype, passes * model.smallest_pass_s)
    found = {}
    for kind in PlanKind:
        reason = _forward_rule(kind, model, longest, bound, request, config)
        if (kind is PlanKind.SPARSE and model.inputs != "text") or (reason and not everything):
            continue
        work = forward_cost(model, sizes, request, max_batch_tokens=config.max_batch_tokens, kind=kind, **arguments)
        effort = forward_features(kind, model, sizes, request, **arguments)
        predicted_s = rest_s + profile.attention_s(kind, effort, model.dtype)
        reason = over_limit(work, limit) if work.peak_bytes > limit else reason or "fits"
        path = (kind.value, model.name), octave(predicted_s), form
        found[kind] = Candidate(kind, work, predicted_s, reason == "fits", reason, model.smallest_pass_s, path)
    return found


def _forward_rule(
    kind: PlanKind, model: ModelInfo, longest: int, bound: float, request: ForwardRequest, config: Config
) -> str:
    """Why a plan may not be chosen; empty where it may. What is asked for is chosen, or refused later."""
    is_auto = request.options.mode == "auto"
    match kind:
        case PlanKind.SPARSE if bound == 0:
            return EXACT_ONLY
        case PlanKind.SPARSE if is_auto and request.task == "explain":
            return "explanations are exact unless sparse is asked for"
        case PlanKind.SPARSE if is_auto and longest < config.sparse_min_tokens:
            return f"{longest} tokens are under sparse_min_tokens {config.sparse_min_tokens}"
        case PlanKind.CHUNKED if is_auto:
            return "dense inside a model bounds its memory as well"
    return ""


def plan_forward(
    model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, profile: DeviceProfile, config: Config
) -> Plan:
    """How the attention of a forward pass is computed: for all layers the kind predicted to be fastest."""
    priced = forward_candidates(model, sizes, request, profile, config)
    return choose_forward(priced, model, sizes, request, config, PredictionCorrector())


def choose_forward(
    priced: Candidates,
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    config: Config,
    pace: PredictionCorrector,
) -> Plan:
    """Of `forward_candidates`, with what was learned."""
    bound, mode = max_error(request.options, config), request.options.mode
    if mode == "sparse" and bound == 0:
        raise invalid(f"mode sparse: {EXACT_ONLY}", param="mode")
    if mode == "sparse" and PlanKind.SPARSE not in priced:
        raise invalid(f"mode sparse: attention of model {model.name!r} is computed exactly", param="mode")
    factors = {kind: pace.factor(one.path) for kind, one in priced.items()}
    chosen, _ = fastest(priced, factors, mode)
    if not chosen.fits:
        chosen = chosen if mode != "auto" else priced[PlanKind.DENSE]
        raise FarsightError(Kind.TOO_LARGE, f"forward {chosen.reason}", code="memory_limit")
    # accounts compare with exact attention, and add what was read
    work = replace(priced[PlanKind.DENSE].cost, peak_bytes=chosen.cost.peak_bytes)
    longest = max(map(sum, sizes), default=0)
    reason = f"longest of {len(sizes)} inputs has {longest} tokens: {seconds_by_plan(priced, factors)}"
    return plan_of(chosen, work, reason, factors[chosen.kind], bound, config)
