"""The plan of a forward pass: one kind of attention for all of its layers, with its price and its reason."""

from __future__ import annotations

from collections.abc import Sequence

from service.config import Config
from service.core.model_info import ModelInfo
from service.core.plan import Plan, PlanKind
from service.core.request import ForwardRequest
from service.errors import FarsightError, Kind, invalid
from service.planning.correction import PredictionCorrector, octave
from service.planning.device_profile import DeviceProfile
from service.planning.forward_cost import Size, forward_cost, forward_features, linear_flops, pass_tokens
from service.planning.planner import (
    EXACT_ONLY,
    Candidate,
    Candidates,
    choose,
    corrected,
    make_plan,
    max_error,
    max_peak_bytes,
    memory_reason,
    predictions,
    sparse_settings,
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
    """The plans that may be chosen for a forward request, priced without corrections. Dense is always one of them.

    Args:
        model: sizes and layers of the model.
        sizes: tokens of each input.
        request: its task and options.
        profile: speed and memory of the device.
        config: limits, and defaults of the options.
        everything: include plans that apply to the model but may not be chosen for this request.

    Returns:
        Candidates by kind.
    """
    limit, sparse = max_peak_bytes(profile, config), sparse_settings(request.options, config)
    longest = max(map(sum, sizes), default=0)
    form = request.task, octave(longest), octave(len(sizes))
    passes = len(pass_tokens(model, sizes, config.max_batch_tokens))
    linear = linear_flops(model, sizes, request, passes)
    linear_s = profile.forward_s(linear, model.dtype, passes * model.smallest_pass_s)
    found = {}
    for kind in PlanKind:
        rule = _rule(kind, longest, request, config)
        if (kind is PlanKind.SPARSE and model.inputs != "text") or (rule and not everything):
            continue
        cost = forward_cost(model, sizes, request, max_batch_tokens=config.max_batch_tokens, kind=kind, sparse=sparse)
        features = forward_features(kind, model, sizes, request)
        timed_as = PlanKind.DENSE if kind is PlanKind.SPARSE else kind
        predicted_s = linear_s + profile.attention_s(timed_as, features, model.dtype)
        reason = memory_reason(cost, limit) or rule or "fits"
        path = (kind.value, model.name), octave(predicted_s), form
        found[kind] = Candidate(kind, cost, predicted_s, reason == "fits", reason, model.smallest_pass_s, path)
    return found


def plan_forward(
    model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, profile: DeviceProfile, config: Config
) -> Plan:
    """The plan of one request, without corrections. Raises FarsightError as `choose_forward`."""
    priced = forward_candidates(model, sizes, request, profile, config)
    return choose_forward(priced, model, sizes, request, config, PredictionCorrector())


def choose_forward(
    priced: Candidates,
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    config: Config,
    corrector: PredictionCorrector,
) -> Plan:
    """The plan of one request, chosen with the learned corrections.

    Args:
        priced: `forward_candidates` of the request.
        model: its name is part of error messages.
        sizes: tokens of each input.
        request: its mode and error.
        config: defaults of the options.
        corrector: what was learned from earlier runs.

    Raises FarsightError: INVALID if sparse is forced and `max_error` is 0 or the model has no sparse attention;
    TOO_LARGE if the forced plan, or every plan, is over the memory limit. A forced mode is never replaced.
    """
    options = request.options
    if options.mode == "sparse":
        exact = EXACT_ONLY if max_error(options, config) == 0 else ""
        if not exact and PlanKind.SPARSE not in priced:
            exact = f"attention of model {model.name!r} is always exact"
        if exact:
            raise invalid(f"mode: expected auto, dense or chunked, got sparse: {exact}", param="mode")
    learned = corrected(priced, corrector)
    chosen = choose(priced, learned, options.mode)
    if not chosen.fits:
        chosen = chosen if options.mode != "auto" else priced[PlanKind.DENSE]
        raise FarsightError(Kind.TOO_LARGE, f"forward {chosen.reason}", code="memory_limit")
    longest = max(map(sum, sizes), default=0)
    reason = f"longest of {len(sizes)} inputs has {longest} tokens: {predictions(learned)}"
    return make_plan(chosen, learned[PlanKind.DENSE], reason, sparse_settings(options, config))


def _rule(kind: PlanKind, longest: int, request: ForwardRequest, config: Config) -> str:
    """Why a plan may not be chosen for its kind; empty if it may. A forced mode is allowed here, or refused later."""
    is_auto = request.options.mode == "auto"
    match kind:
        case PlanKind.SPARSE if max_error(request.options, config) == 0:
            return EXACT_ONLY
        case PlanKind.SPARSE if is_auto and request.task == "explain":
            return "explanations are exact unless mode is sparse"
        case PlanKind.SPARSE if is_auto and longest < config.sparse_min_tokens:
            return f"{longest} tokens are under sparse_min_tokens {config.sparse_min_tokens}"
        case PlanKind.CHUNKED if is_auto:
            return "dense attention inside a model bounds its memory as well"
    return ""
