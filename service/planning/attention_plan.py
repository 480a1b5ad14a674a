"""The plan of an attention request: dense, chunked or sparse, with its price and its reason."""

from __future__ import annotations

from service.config import Config
from service.core.options import AttentionOptions
from service.core.plan import Plan, PlanKind
from service.core.request import AttentionShape
from service.errors import FarsightError, Kind, invalid
from service.planning.attention_cost import attention_cost, attention_features
from service.planning.correction import PredictionCorrector, octave
from service.planning.device_profile import DeviceProfile
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


def attention_candidates(
    shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config
) -> Candidates:
    """All three plans of one request, priced without corrections."""
    limit, sparse = max_peak_bytes(profile, config), sparse_settings(options, config)
    sizes = tuple(octave(size) for size in (shape.heads, shape.query_length, shape.key_length, shape.head_dim))
    form = options.is_causal, options.window is not None, len(options.returns), *sizes
    found = {}
    for kind in PlanKind:
        cost = attention_cost(kind, shape, options, sparse)
        predicted_s = profile.attention_s(kind, attention_features(kind, shape, options, sparse), shape.dtype)
        reason = memory_reason(cost, limit) or _rule(kind, shape, options, config) or "fits"
        shared_s = profile.call_s(kind, shape.dtype)
        path = (kind.value, shape.dtype), octave(predicted_s), form
        found[kind] = Candidate(kind, cost, predicted_s, reason == "fits", reason, shared_s, path)
    return found


def plan_attention(shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config) -> Plan:
    """The plan of one request, without corrections. Raises FarsightError as `choose_attention`."""
    priced = attention_candidates(shape, options, profile, config)
    return choose_attention(priced, shape, options, config, PredictionCorrector())


def choose_attention(
    priced: Candidates,
    shape: AttentionShape,
    options: AttentionOptions,
    config: Config,
    corrector: PredictionCorrector,
) -> Plan:
    """The plan of one request, chosen with the learned corrections.

    Args:
        priced: `attention_candidates` of the request.
        shape: sizes of its tensors.
        options: its mode and error.
        config: defaults of the options.
        corrector: what was learned from earlier runs.

    Raises FarsightError: INVALID if sparse is forced and `max_error` is 0; TOO_LARGE if the forced plan, or every plan,
    is over the memory limit. A forced mode is never replaced.
    """
    learned = corrected(priced, corrector)
    chosen = choose(priced, learned, options.mode)
    if options.mode == "sparse" and max_error(options, config) == 0:
        raise invalid(f"mode: expected auto, dense or chunked, got sparse: {EXACT_ONLY}", param="mode")
    if not chosen.fits:
        if options.mode == "auto":  # every exact plan is too large; sparse may be excluded for another reason
            exact = priced[PlanKind.DENSE], priced[PlanKind.CHUNKED]
            chosen = min(exact, key=lambda candidate: candidate.cost.peak_bytes)
        raise FarsightError(Kind.TOO_LARGE, f"{chosen.kind} attention {chosen.reason}", code="memory_limit")
    reason = f"mode {options.mode} was requested"
    if options.mode == "auto":
        reason = f"{shape.key_length} keys: {predictions(learned)}"
    return make_plan(chosen, learned[PlanKind.DENSE], reason, sparse_settings(options, config))


def _rule(kind: PlanKind, shape: AttentionShape, options: AttentionOptions, config: Config) -> str:
    """Why a plan may not be chosen for its kind; empty if it may."""
    if kind is not PlanKind.SPARSE:
        return ""
    if max_error(options, config) == 0:
        return EXACT_ONLY
    if options.mode == "auto" and shape.key_length < config.sparse_min_tokens:
        return f"{shape.key_length} keys are under sparse_min_tokens {config.sparse_min_tokens}"
    return ""
