"""Where the knee is: the offered load is raised until a threshold is missed, then halved in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtests.figures import by_bucket
from loadtests.run import Run
from loadtests.thresholds import Limits, Seconds, judge

SUSTAINED = 0.95  # least share of what is offered that must be answered within its SLO
STEP_FACTOR = 1.5
EXACT_TO = 1.15  # between the highest load that was sustained and the lowest that was not
LOWEST = 1 / 16  # of the first scale: a service that cannot do that is broken


@dataclass(frozen=True, slots=True)
class Step:
    """One offered load, and which thresholds it missed."""

    run: Run
    missed: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Times the scenario's rates."""
        return self.run.options.scale

    @property
    def sustained(self) -> bool:
        return not self.missed


def judged(run: Run, limits: Limits, slo_s: Seconds) -> Step:
    """By the thresholds of a single run. A length that was not offered, as in a short step, is not judged."""
    offered = by_bucket(run.samples)
    bounds: dict[str, object] = {
        name: {bucket: limit for bucket, limit in getattr(limits, name).items() if bucket in offered}
        for name in ("p50_s", "p99_s")
    }
    bounds["goodput"] = max(limits.goodput or 0.0, SUSTAINED)
    checks = judge(run.samples, limits.model_copy(update=bounds), slo_s)
    return Step(run, tuple(str(one) for one in checks if not one.passed))


def next_scale(steps: Sequence[Step], first: float = 1.0) -> float | None:
    """What to try after these; None: the knee is known."""
    if not steps:
        return first
    held = max((one.scale for one in steps if one.sustained), default=None)
    broken = min((one.scale for one in steps if not one.sustained), default=None)
    if broken is None:
        return max(one.scale for one in steps) * STEP_FACTOR
    if held is None:
        return broken / STEP_FACTOR if broken > first * LOWEST else None
    # a lucky step above an unlucky one ends the search, too
    return float((held * broken) ** 0.5) if broken / held > EXACT_TO else None


def sweep(measure: Callable[[float], Step], first: float, most: int) -> Iterator[Step]:
    """Each at the scale that the ones before ask for, at most so many."""
    steps: list[Step] = []
    while len(steps) < most and (scale := next_scale(steps, first)) is not None:
        steps.append(measure(scale))
        yield steps[-1]


def knee(steps: Sequence[Step]) -> Step | None:
    """The highest load below every one that was not sustained; None, too, where all were, and it lies above."""
    broken = min((one.scale for one in steps if not one.sustained), default=-math.inf)
    held = [one for one in steps if one.sustained and one.scale < broken]
    return max(held, key=lambda one: one.scale, default=None)


def verdict(steps: Sequence[Step]) -> str:
    if (found := knee(steps)) is not None:
        return f"the knee is at {found.run.offered_per_s:.1f} requests/s"
    if all(one.sustained for one in steps):
        most = max(one.run.offered_per_s for one in steps)
        return f"the knee is above {most:.1f} requests/s: no step missed a threshold"
    return "no load was sustained"
