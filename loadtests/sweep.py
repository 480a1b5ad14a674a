"""Where the knee is: the offered load is raised until too few answers come in time, then halved in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtests.figures import Totals
from loadtests.run import Run

SUSTAINED = 0.95  # share of what is offered that must be answered within its SLO
STEP_FACTOR = 1.5
EXACT_TO = 1.15  # between the highest load that was sustained and the lowest that was not
LOWEST = 1 / 16  # of the first scale: a service that cannot do that is broken


@dataclass(frozen=True, slots=True)
class Point:
    """One offered load, as a multiple of the scenario's rates."""

    scale: float
    sustained: bool


def next_scale(points: Sequence[Point], first: float = 1.0) -> float | None:
    """What to try after these; None: the knee is known."""
    if not points:
        return first
    held = max((one.scale for one in points if one.sustained), default=None)
    broken = min((one.scale for one in points if not one.sustained), default=None)
    if broken is None:
        return max(one.scale for one in points) * STEP_FACTOR
    if held is None:
        return broken / STEP_FACTOR if broken > first * LOWEST else None
    # a lucky step above an unlucky one ends the search, too
    return float((held * broken) ** 0.5) if broken / held > EXACT_TO else None


def sweep(measure: Callable[[float], Run], slo_s: dict[str, float], first: float, most: int) -> Iterator[Run]:
    """Runs, each at the scale that the ones before ask for, at most so many."""
    points: list[Point] = []
    while len(points) < most and (scale := next_scale(points, first)) is not None:
        run = measure(scale)
        points.append(Point(scale, is_sustained(run, slo_s)))
        yield run


def is_sustained(run: Run, slo_s: dict[str, float]) -> bool:
    return Totals.of(run.samples, slo_s).share("good") >= SUSTAINED


def knee(runs: Sequence[Run], slo_s: dict[str, float]) -> Run | None:
    """The highest load below every one that was not sustained."""
    broken = min((one.options.scale for one in runs if not is_sustained(one, slo_s)), default=float("inf"))
    held = [one for one in runs if is_sustained(one, slo_s) and one.options.scale < broken]
    return max(held, key=lambda one: one.options.scale, default=None)
