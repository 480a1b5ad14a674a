"""The choice between dense, chunked and sparse: the fastest plan within the limits of memory and error.

`attention_plan.py` and `forward_plan.py` price the candidates; the rules that both share are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.attention import scaled_epsilon
from service.config import Config
from service.core.options import AttentionOptions, ForwardOptions
from service.core.plan import Cost, Plan, PlanKind
from service.planning.attention_cost import REAL_MODEL, STRUCTURED, SparseSettings
from service.planning.correction import PredictionCorrector, WorkPath
from service.planning.device_profile import DeviceProfile

EPSILON_MAX_ERROR = 0.02
SWITCH = 0.8  # share of the usual plan's seconds that a plan must stay below to replace it
EXACT_ONLY = "max_error 0 requires an exact answer"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a request: its cost, and whether it may be chosen."""

    kind: PlanKind
    cost: Cost  # of this plan
    predicted_s: float
    fits: bool
    reason: str  # "fits", or why it may not be chosen
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: WorkPath = ()
    correction: float = 1.0  # learned factor, contained in predicted_s and shared_s


Candidates = Mapping[PlanKind, Candidate]


def corrected(priced: Candidates, corrector: PredictionCorrector) -> Candidates:
    """The candidates with their seconds multiplied by the factors learned for their kinds of work."""
    found = {}
    for kind, candidate in priced.items():
        factor = corrector.factor(candidate.path)
        predicted_s, shared_s = factor * candidate.predicted_s, factor * candidate.shared_s
        # not `replace`, which takes twice as long: this runs for every plan of every request
        found[kind] = Candidate(
            kind, candidate.cost, predicted_s, candidate.fits, candidate.reason, shared_s, candidate.path, factor
        )
    return found


def choose(priced: Candidates, learned: Candidates, mode: str) -> Candidate:
    """The candidate of a forced mode, or the fastest that fits.

    A correction changes the choice only if it promises much (`SWITCH`): otherwise requests near the border would change
    their plan, and with it the last digits of their answers, with every fluctuation.

    Args:
        priced: candidates without corrections.
        learned: the same candidates, `corrected`.
        mode: "auto", or the kind that the caller forces.

    Returns:
        A candidate of `learned`. It may not fit: if its mode is forced, or if no candidate fits.
    """
    if mode != "auto":
        return learned[PlanKind(mode)]
    fitting = [kind for kind, candidate in priced.items() if candidate.fits] or list(priced)
    usual = learned[min(fitting, key=lambda kind: priced[kind].predicted_s)]
    fastest = learned[min(fitting, key=lambda kind: learned[kind].predicted_s)]
    return fastest if fastest.predicted_s < SWITCH * usual.predicted_s else usual


def exact_kind(priced: Candidates, corrector: PredictionCorrector) -> PlanKind:
    """The plan that replaces a sparse answer over its error: the faster exact one that fits, else chunked."""
    exact = [priced[PlanKind.DENSE], priced[PlanKind.CHUNKED]]
    fitting = [candidate for candidate in exact if candidate.fits] or exact[1:]
    return min(fitting, key=lambda candidate: corrector.factor(candidate.path) * candidate.predicted_s).kind


def predictions(learned: Candidates) -> str:
    """The predicted seconds of every candidate, and why some may not be chosen: the reason of a plan."""
    return ", ".join(
        f"{candidate.kind} {candidate.predicted_s:.3g} s" + ("" if candidate.fits else f" ({candidate.reason})")
        for candidate in learned.values()
    )


def make_plan(chosen: Candidate, dense: Candidate, reason: str, sparse: SparseSettings) -> Plan:
    """The plan of a chosen candidate, next to the dense price of the same request."""
    is_sparse = chosen.kind is PlanKind.SPARSE
    return Plan(
        kind=chosen.kind,
        cost=chosen.cost,
        predicted_s=chosen.predicted_s,
        reason=reason,
        block_size=sparse.block_size,
        selection="moments" if is_sparse else None,
        epsilon=sparse.epsilon if is_sparse else None,
        shared_s=chosen.shared_s,
        path=chosen.path,
        correction=chosen.correction,
        dense_cost=dense.cost,
        dense_s=dense.predicted_s,
    )


def max_error(options: AttentionOptions | ForwardOptions, config: Config) -> float:
    """The relative L2 error that a request allows; the configured one of its kind if it sets none."""
    if options.max_error is not None:
        return options.max_error
    return config.model_max_error if isinstance(options, ForwardOptions) else config.max_error


def epsilon_for(max_error: float, config: Config) -> float:
    """The epsilon that sparse attention tries first for a `max_error`; `config.epsilon` suits 0.02."""
    return scaled_epsilon(config.epsilon, max_error / EPSILON_MAX_ERROR)


def sparse_settings(options: AttentionOptions | ForwardOptions, config: Config) -> SparseSettings:
    """How a sparse plan of this request would be computed."""
    audit_rows = options.audit_rows if isinstance(options, AttentionOptions) else None
    epsilon = epsilon_for(max_error(options, config), config)
    reading = REAL_MODEL if isinstance(options, ForwardOptions) else STRUCTURED
    return SparseSettings(config.block_size, audit_rows or config.audit_rows, epsilon, reading)


def max_peak_bytes(profile: DeviceProfile, config: Config) -> int:
    """The largest predicted peak that one request may have; other requests, models and the allocator get the rest."""
    return config.max_peak_bytes or int(0.6 * profile.free_bytes)


def memory_reason(cost: Cost, limit: int) -> str:
    """Why a plan with this peak may not be chosen; empty if its peak is within `limit` bytes."""
    return f"needs {cost.peak_bytes} bytes, over the limit of {limit} bytes" if cost.peak_bytes > limit else ""
