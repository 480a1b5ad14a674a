"""Dense, chunked or sparse: the fastest plan that fits memory and the caller's error, with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.attention import ERROR_EXPONENT
from service.config import Config
from service.core import (
    AttentionOptions,
    AttentionShape,
    ForwardOptions,
    ForwardRequest,
    ModelInfo,
    Plan,
    PlanKind,
    Work,
)
from service.engine.calibration import DeviceProfile
from service.engine.cost import (
    Size,
    attention_effort,
    attention_work,
    forward_effort,
    forward_work,
    linear_flops,
    pass_tokens,
)
from service.engine.pace import Pace, Path, octave
from service.errors import FarsightError, Kind, invalid

EPSILON_MAX_ERROR = 0.02
SWITCH = 0.8  # of the usual plan's seconds: below, what was learned changes the choice
EXACT_ONLY = "max_error 0 asks for an exact answer"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a request: what it costs, and whether it may be used."""

    kind: PlanKind
    work: Work
    predicted_s: float
    fits: bool
    reason: str
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: Path = ()  # the kind of work, as `pace.py` learns it


Candidates = Mapping[PlanKind, Candidate]
Factors = Mapping[PlanKind, float]


def paced(priced: Candidates, pace: Pace) -> Candidates:
    """The same with what was learned of their predictions, for whoever asks what they would take."""
    found = {}
    for kind, one in priced.items():
        factor = pace.factor(one.path)
        found[kind] = replace(one, predicted_s=factor * one.predicted_s, shared_s=factor * one.shared_s)
    return found


def candidates(
    shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config
) -> Mapping[PlanKind, Candidate]:
    """All three plans priced for one request."""
    limit = max_peak_bytes(profile, config)
    arguments: dict[str, Any] = {
        "block_size": config.block_size,
        "audit_rows": options.audit_rows or config.audit_rows,
        "epsilon": epsilon_for(max_error(options, config), config),
    }
    form = tuple(octave(size) for size in (shape.heads, shape.query_length, shape.key_length, shape.head_dim))
    found = {}
    for kind in PlanKind:
        work = attention_work(kind, shape, options, **arguments)
        predicted_s = profile.attention_s(kind, attention_effort(kind, shape, options, **arguments), shape.dtype)
        reason = "fits"
        if work.peak_bytes > limit:
            reason = _over(work, limit)
        elif kind is PlanKind.SPARSE and max_error(options, config) == 0:
            reason = EXACT_ONLY
        elif kind is PlanKind.SPARSE and options.mode == "auto" and shape.key_length < config.sparse_min_tokens:
            reason = f"{shape.key_length} keys are under sparse_min_tokens {config.sparse_min_tokens}"
        masked = options.is_causal, options.window is not None, len(options.returns)
        path = (kind.value, shape.dtype), octave(predicted_s), (*masked, *form)
        shared_s = profile.call_s(kind, shape.dtype)
        found[kind] = Candidate(kind, work, predicted_s, reason == "fits", reason, shared_s, path)
    return found


def _over(work: Work, limit: int) -> str:
    return f"needs {work.peak_bytes} bytes, over the limit of {limit} bytes"


def epsilon_for(max_error: float, config: Config) -> float:
    """The first epsilon to try: `config.epsilon` suits a max_error of 0.02."""
    return float(min(1.0, max(1e-6, config.epsilon * (max_error / EPSILON_MAX_ERROR) ** (1 / ERROR_EXPONENT))))


def max_error(options: AttentionOptions | ForwardOptions, config: Config) -> float:
    return config.max_error if options.max_error is None else options.max_error


def max_peak_bytes(profile: DeviceProfile, config: Config) -> int:
    """Largest predicted peak of one request; the rest is for its neighbours, the models and the allocator."""
    return config.max_peak_bytes or int(0.6 * profile.free_bytes)


def plan_attention(shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config) -> Plan:
    """The plan of one request. A forced mode that does not fit is refused (413), not replaced."""
    return choose_attention(candidates(shape, options, profile, config), shape, options, config, Pace())


def choose_attention(
    priced: Candidates, shape: AttentionShape, options: AttentionOptions, config: Config, pace: Pace
) -> Plan:
    """Of `candidates`, with what was learned."""
    factors = {kind: pace.factor(one.path) for kind, one in priced.items()}
    chosen, reason = _chosen(priced, factors, options.mode)
    bound = max_error(options, config)
    if chosen.kind is PlanKind.SPARSE and bound == 0:
        raise invalid(f"mode sparse: {EXACT_ONLY}", param="mode")
    if not chosen.fits:
        raise FarsightError(Kind.TOO_LARGE, f"{chosen.kind} attention {chosen.reason}", code="memory_limit")
    reason = reason or f"{shape.key_length} keys: {_told(priced, factors)}"
    return _plan(chosen, chosen.work, reason, factors[chosen.kind], bound, config)


def _chosen(priced: Candidates, factors: Factors, mode: str) -> tuple[Candidate, str]:
    """The candidate, and why where it was asked for.

    What was learned replaces the choice only where it promises much: work near the border would else change its plan,
    and by that its answer's last digits, with every fluctuation.
    """
    if mode != "auto":
        return priced[PlanKind(mode)], f"mode {mode} was asked for"
    fitting = [one for one in priced.values() if one.fits] or list(priced.values())
    usual = min(fitting, key=lambda one: one.predicted_s)
    best = min(fitting, key=lambda one: factors[one.kind] * one.predicted_s)
    switches = factors[best.kind] * best.predicted_s < SWITCH * factors[usual.kind] * usual.predicted_s
    return best if switches else usual, ""


def _told(priced: Candidates, factors: Factors) -> str:
    return ", ".join(
        f"{one.kind} {factors[one.kind] * one.predicted_s:.3g} s" + ("" if one.fits else f" ({one.reason})")
        for one in priced.values()
    )


def _plan(chosen: Candidate, work: Work, reason: str, factor: float, bound: float, config: Config) -> Plan:
    sparse = chosen.kind is PlanKind.SPARSE
    return Plan(
        kind=chosen.kind,
        work=work,
        predicted_s=factor * chosen.predicted_s,
        reason=reason,
        shared_s=factor * chosen.shared_s,
        block_size=config.block_size,
        selection="moments" if sparse else None,
        epsilon=epsilon_for(bound, config) if sparse else None,
        path=chosen.path,
        pace=factor,
    )


def exact_kind(priced: Candidates, pace: Pace) -> PlanKind:
    """What replaces a sparse answer that erred too much: the faster exact plan that fits."""
    exact = [priced[PlanKind.DENSE], priced[PlanKind.CHUNKED]]
    return min([c for c in exact if c.fits] or exact[1:], key=lambda one: pace.factor(one.path) * one.predicted_s).kind


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
        work = forward_work(model, sizes, request, max_batch_tokens=config.max_batch_tokens, kind=kind, **arguments)
        effort = forward_effort(kind, model, sizes, request, **arguments)
        predicted_s = rest_s + profile.attention_s(kind, effort, model.dtype)
        reason = _over(work, limit) if work.peak_bytes > limit else reason or "fits"
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
    return choose_forward(priced, model, sizes, request, config, Pace())


def choose_forward(
    priced: Candidates, model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, config: Config, pace: Pace
) -> Plan:
    """Of `forward_candidates`, with what was learned."""
    bound, mode = max_error(request.options, config), request.options.mode
    if mode == "sparse" and bound == 0:
        raise invalid(f"mode sparse: {EXACT_ONLY}", param="mode")
    if mode == "sparse" and PlanKind.SPARSE not in priced:
        raise invalid(f"mode sparse: attention of model {model.name!r} is computed exactly", param="mode")
    factors = {kind: pace.factor(one.path) for kind, one in priced.items()}
    chosen, _ = _chosen(priced, factors, mode)
    if not chosen.fits:
        chosen = chosen if mode != "auto" else priced[PlanKind.DENSE]
        raise FarsightError(Kind.TOO_LARGE, f"forward {chosen.reason}", code="memory_limit")
    # accounts compare with exact attention, and add what was read
    work = replace(priced[PlanKind.DENSE].work, peak_bytes=chosen.work.peak_bytes)
    longest = max(map(sum, sizes), default=0)
    reason = f"longest of {len(sizes)} inputs has {longest} tokens: {_told(priced, factors)}"
    return _plan(chosen, work, reason, factors[chosen.kind], bound, config)
