"""Finds the knee: raises the offered load until a threshold is missed, then bisects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtests.figures import by_bucket
from loadtests.run import Run
from loadtests.thresholds import Limits, Seconds, judge

SUSTAINED = 0.95  # minimum share of the offered requests answered within the SLO
STEP_FACTOR = 1.5
EXACT_TO = 1.15  # ratio of the lowest load that was not sustained to the highest that was
LOWEST = 1 / 16  # of the first scale; a service that cannot sustain this is broken


@dataclass(frozen=True, slots=True)
class Step:
    """A run at one offered load, and the thresholds that it missed."""

    run: Run
    missed: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor for the rates of the scenario."""
        return self.run.options.scale

    @property
    def sustained(self) -> bool:
        return not self.missed


def judged(run: Run, limits: Limits, slo_s: Seconds) -> Step:
    """Compare a run with the thresholds of the scenario. Lengths without requests, as in a short step, are skipped."""
    offered = by_bucket(run.samples)
    bounds: dict[str, object] = {
        name: {bucket: limit for bucket, limit in getattr(limits, name).items() if bucket in offered}
        for name in ("p50_s", "p99_s")
    }
    bounds["goodput"] = max(limits.goodput or 0.0, SUSTAINED)
    checks = judge(run.samples, limits.model_copy(update=bounds), slo_s)
    return Step(run, tuple(str(check) for check in checks if not check.passed))


def next_scale(steps: Sequence[Step], first: float = 1.0) -> float | None:
    """The next scale to try; None: the knee is known."""
    if not steps:
        return first
    held = max((step.scale for step in steps if step.sustained), default=None)
    broken = min((step.scale for step in steps if not step.sustained), default=None)
    if broken is None:
        return max(step.scale for step in steps) * STEP_FACTOR
    if held is None:
        return broken / STEP_FACTOR if broken > first * LOWEST else None
    # a lucky step above an unlucky one also ends the search
    return float((held * broken) ** 0.5) if broken / held > EXACT_TO else None


def sweep(measure: Callable[[float], Step], first: float, limit: int) -> Iterator[Step]:
    """Measure at most `limit` steps, each at the scale that follows from the previous ones."""
    steps: list[Step] = []
    while len(steps) < limit and (scale := next_scale(steps, first)) is not None:
        steps.append(measure(scale))
        yield steps[-1]


def knee(steps: Sequence[Step]) -> Step | None:
    """The highest sustained load below all that were not; None if there is none, or if all were sustained."""
    broken = min((step.scale for step in steps if not step.sustained), default=-math.inf)
    held = [step for step in steps if step.sustained and step.scale < broken]
    return max(held, key=lambda step: step.scale, default=None)


def verdict(steps: Sequence[Step]) -> str:
    if (found := knee(steps)) is not None:
        return f"the knee is at {found.run.offered_per_s:.1f} requests/s"
    if all(step.sustained for step in steps):
        highest = max(step.run.offered_per_s for step in steps)
        return f"the knee is above {highest:.1f} requests/s: no step missed a threshold"
    return "no load was sustained"
