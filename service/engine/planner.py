"""Dense, chunked or sparse: the fastest plan that fits memory and the caller's error, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    Effort,
    attention_effort,
    attention_work,
    forward_effort,
    forward_work,
    pair_flops,
)
from service.errors import FarsightError, Kind, invalid

EPSILON_MAX_ERROR = 0.02


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a request: what it costs, and whether it may be used."""

    kind: PlanKind
    work: Work
    predicted_s: float
    fits: bool
    reason: str


def candidates(
    shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config
) -> Mapping[PlanKind, Candidate]:
    """All three plans priced for one request."""
    limit = max_peak_bytes(profile, config)
    found = {}
    for kind in PlanKind:
        work = attention_work(kind, shape, options, block_size=config.block_size)
        predicted_s = profile.attention_s(kind, _effort(kind, shape, options, config), shape.dtype)
        reason = "fits"
        if work.peak_bytes > limit:
            reason = f"needs {work.peak_bytes} bytes, over the limit of {limit} bytes"
        elif kind is PlanKind.SPARSE and max_error(options, config) == 0:
            reason = "max_error 0 asks for an exact answer"
        elif kind is PlanKind.SPARSE and options.mode == "auto" and shape.key_length < config.sparse_min_tokens:
            reason = f"{shape.key_length} keys are under sparse_min_tokens {config.sparse_min_tokens}"
        found[kind] = Candidate(kind, work, predicted_s, reason == "fits", reason)
    return found


def _effort(kind: PlanKind, shape: AttentionShape, options: AttentionOptions, config: Config) -> Effort:
    return attention_effort(
        kind,
        shape,
        options,
        block_size=config.block_size,
        audit_rows=options.audit_rows or config.audit_rows,
        epsilon=epsilon_for(max_error(options, config), config),
    )


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
    priced = candidates(shape, options, profile, config)
    if options.mode != "auto":
        chosen = priced[PlanKind(options.mode)]
        reason = f"mode {options.mode} was asked for"
    else:
        fitting = [candidate for candidate in priced.values() if candidate.fits]
        chosen = min(fitting or priced.values(), key=lambda candidate: candidate.predicted_s)
        reason = f"{shape.key_length} keys: " + ", ".join(
            f"{candidate.kind} {candidate.predicted_s:.3g} s" + ("" if candidate.fits else f" ({candidate.reason})")
            for candidate in priced.values()
        )
    if chosen.kind is PlanKind.SPARSE and max_error(options, config) == 0:
        raise invalid("mode sparse: max_error 0 asks for an exact answer", param="mode")
    if not chosen.fits:
        raise FarsightError(Kind.TOO_LARGE, f"{chosen.kind} attention {chosen.reason}", code="memory_limit")
    sparse = chosen.kind is PlanKind.SPARSE
    return Plan(
        kind=chosen.kind,
        work=chosen.work,
        predicted_s=chosen.predicted_s,
        reason=reason,
        shared_s=profile.call_s(chosen.kind, shape.dtype),
        block_size=config.block_size,
        selection="moments" if sparse else None,
        epsilon=epsilon_for(max_error(options, config), config) if sparse else None,
    )


def exact_kind(shape: AttentionShape, options: AttentionOptions, profile: DeviceProfile, config: Config) -> PlanKind:
    """What replaces a sparse answer that erred too much: the faster exact plan that fits."""
    priced = candidates(shape, options, profile, config)
    exact = [priced[PlanKind.DENSE], priced[PlanKind.CHUNKED]]
    return min([c for c in exact if c.fits] or exact[1:], key=lambda candidate: candidate.predicted_s).kind


def plan_forward(
    model: ModelInfo, lengths: tuple[int, ...], request: ForwardRequest, profile: DeviceProfile, config: Config
) -> Plan:
    """How the attention of a forward pass is computed: for all layers the kind predicted to be fastest."""
    options = request.options
    work = forward_work(model, lengths, request, max_batch_tokens=config.max_batch_tokens)
    limit = max_peak_bytes(profile, config)
    if work.peak_bytes > limit:
        raise FarsightError(
            Kind.TOO_LARGE,
            f"forward needs {work.peak_bytes} bytes, over the limit of {limit} bytes",
            code="memory_limit",
        )
    bound, longest = max_error(options, config), max(lengths)
    epsilon = epsilon_for(bound, config)
    if options.mode == "sparse" and bound == 0:
        raise invalid("mode sparse: max_error 0 asks for an exact answer", param="mode")
    if options.mode == "sparse" and model.inputs != "text":
        raise invalid(f"mode sparse: attention of model {model.name!r} is computed exactly", param="mode")
    kinds = [PlanKind.DENSE, PlanKind.SPARSE]  # chunked is for memory, which dense inside a model bounds as well
    if options.mode != "auto":
        kinds = [PlanKind(options.mode)]
    elif longest < config.sparse_min_tokens or bound == 0 or model.inputs != "text" or request.task == "explain":
        kinds = [PlanKind.DENSE]
    passes = max(1, -(-sum(lengths) // config.max_batch_tokens))
    linear_flops = work.flops - pair_flops(work.pairs, model.head_dim, model.head_dim)
    predicted: dict[PlanKind, float] = {}
    for kind in kinds:
        effort = forward_effort(kind, model, lengths, block_size=config.block_size, epsilon=epsilon)
        rest_s = profile.forward_s(linear_flops, model.dtype, passes * model.smallest_pass_s)
        predicted[kind] = rest_s + profile.attention_s(kind, effort, model.dtype)
    chosen = min(predicted, key=predicted.__getitem__)
    told = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in predicted.items())
    return Plan(
        kind=chosen,
        work=work,
        predicted_s=predicted[chosen],
        reason=f"longest of {len(lengths)} inputs has {longest} tokens: {told}",
        shared_s=model.smallest_pass_s,
        block_size=config.block_size,
        selection="moments" if chosen is PlanKind.SPARSE else None,
        epsilon=epsilon if chosen is PlanKind.SPARSE else None,
    )
