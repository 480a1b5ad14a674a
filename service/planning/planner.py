"""Dense, chunked or sparse: the fastest plan that fits memory and the caller's error, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from service.attention import ERROR_EXPONENT
from service.config import Config
from service.core.options import AttentionOptions, ForwardOptions
from service.core.plan import Cost, Plan, PlanKind
from service.core.request import AttentionShape
from service.errors import FarsightError, Kind, invalid
from service.planning.attention_cost import attention_cost, attention_features
from service.planning.correction import Path, PredictionCorrector, octave
from service.planning.device_profile import DeviceProfile

EPSILON_MAX_ERROR = 0.02
SWITCH = 0.8  # of the usual plan's seconds: below, what was learned changes the choice
EXACT_ONLY = "max_error 0 asks for an exact answer"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a request: what it costs, and whether it may be used."""

    kind: PlanKind
    cost: Cost
    predicted_s: float
    fits: bool
    reason: str
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: Path = ()  # the kind of work, as `pace.py` learns it


Candidates = Mapping[PlanKind, Candidate]
Factors = Mapping[PlanKind, float]


def corrected(priced: Candidates, pace: PredictionCorrector) -> Candidates:
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
        work = attention_cost(kind, shape, options, **arguments)
        predicted_s = profile.attention_s(kind, attention_features(kind, shape, options, **arguments), shape.dtype)
        reason = "fits"
        if work.peak_bytes > limit:
            reason = over_limit(work, limit)
        elif kind is PlanKind.SPARSE and max_error(options, config) == 0:
            reason = EXACT_ONLY
        elif kind is PlanKind.SPARSE and options.mode == "auto" and shape.key_length < config.sparse_min_tokens:
            reason = f"{shape.key_length} keys are under sparse_min_tokens {config.sparse_min_tokens}"
        masked = options.is_causal, options.window is not None, len(options.returns)
        path = (kind.value, shape.dtype), octave(predicted_s), (*masked, *form)
        shared_s = profile.call_s(kind, shape.dtype)
        found[kind] = Candidate(kind, work, predicted_s, reason == "fits", reason, shared_s, path)
    return found


def over_limit(cost: Cost, limit: int) -> str:
    return f"needs {cost.peak_bytes} bytes, over the limit of {limit} bytes"


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
    return choose_attention(candidates(shape, options, profile, config), shape, options, config, PredictionCorrector())


def choose_attention(
    priced: Candidates, shape: AttentionShape, options: AttentionOptions, config: Config, pace: PredictionCorrector
) -> Plan:
    """Of `candidates`, with what was learned."""
    factors = {kind: pace.factor(one.path) for kind, one in priced.items()}
    chosen, reason = fastest(priced, factors, options.mode)
    bound = max_error(options, config)
    if chosen.kind is PlanKind.SPARSE and bound == 0:
        raise invalid(f"mode sparse: {EXACT_ONLY}", param="mode")
    if not chosen.fits:
        raise FarsightError(Kind.TOO_LARGE, f"{chosen.kind} attention {chosen.reason}", code="memory_limit")
    reason = reason or f"{shape.key_length} keys: {seconds_by_plan(priced, factors)}"
    return plan_of(chosen, chosen.cost, reason, factors[chosen.kind], bound, config)


def fastest(priced: Candidates, factors: Factors, mode: str) -> tuple[Candidate, str]:
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


def seconds_by_plan(priced: Candidates, factors: Factors) -> str:
    return ", ".join(
        f"{one.kind} {factors[one.kind] * one.predicted_s:.3g} s" + ("" if one.fits else f" ({one.reason})")
        for one in priced.values()
    )


def plan_of(chosen: Candidate, cost: Cost, reason: str, factor: float, bound: float, config: Config) -> Plan:
    sparse = chosen.kind is PlanKind.SPARSE
    return Plan(
        kind=chosen.kind,
        cost=cost,
        predicted_s=factor * chosen.predicted_s,
        reason=reason,
        shared_s=factor * chosen.shared_s,
        block_size=config.block_size,
        selection="moments" if sparse else None,
        epsilon=epsilon_for(bound, config) if sparse else None,
        path=chosen.path,
        pace=factor,
    )


def exact_kind(priced: Candidates, pace: PredictionCorrector) -> PlanKind:
    """What replaces a sparse answer that erred too much: the faster exact plan that fits."""
    exact = [priced[PlanKind.DENSE], priced[PlanKind.CHUNKED]]
    return min([c for c in exact if c.fits] or exact[1:], key=lambda one: pace.factor(one.path) * one.predicted_s).kind
