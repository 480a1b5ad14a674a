"""How predicted seconds turn out: learned by kind of work, and for the machine as a whole, from what ran.

No calibration has seen every shape, and what else a machine does changes faster than any. A kind is named by a path
from the general to the special, such as (dense, float32), its size, its exact form. Every step of the path has a
correction of its own, in log seconds, and so has the machine. What a run took beyond its corrected prediction is taken
off in that order: each takes a part of what is left, so that together they never overshoot, and a kind that has not run
yet is corrected by the general ones.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from service.core.plan import Plan

Path = tuple[Hashable, ...]

# tried on recorded runs of a machine that others used on and off: what is left of an error is least with these
MEMORY_S = 1.0  # of device time: how long the machine's own pace is remembered
MACHINE_RATE, KIND_RATE = 0.25, 0.1  # the least part of what is left of a run's error that a correction takes
SURPRISE = 0.5  # log seconds: a larger error of one run counts as this
BOUNDS = math.log(0.25), math.log(8.0)
FADE_S = 600.0  # of device time: what did not run for so long is hardly corrected, and may be tried again
MOST_KINDS = 4096


@dataclass(slots=True)
class _Correction:
    log: float = 0.0
    runs: int = 0
    at_s: float = 0.0  # of all device time when it was last learned

    def faded(self, now_s: float) -> float:
        return self.log * math.exp((self.at_s - now_s) / FADE_S)

    def learn(self, error: float, now_s: float) -> float:
        """What is left of `error`. The first runs count as if two had gone as predicted before."""
        step = error * max(KIND_RATE, 1.0 / (self.runs + 3))
        self.log, self.at_s = self.faded(now_s) + step, now_s
        self.runs += 1
        return error - step


class PredictionCorrector:
    """Seconds that a predicted second takes. One thread learns, any may ask."""

    def __init__(self) -> None:
        self._machine = self._now_s = 0.0
        self._kinds: dict[Path, _Correction] = {}

    def factor(self, path: Path) -> float:
        """What a prediction for this kind of work is to be multiplied with; 1 for what never ran on a quiet machine."""
        low, high = BOUNDS
        return math.exp(min(high, max(low, self._machine + self._of_kind(path))))

    def learn(self, path: Path, predicted_s: float, used_s: float) -> None:
        """A run of this kind has ended; `predicted_s` without any correction."""
        if not (predicted_s > 0 and used_s > 0):
            return
        error = math.log(used_s / predicted_s) - self._machine - self._of_kind(path)
        error = min(SURPRISE, max(-SURPRISE, error))
        step = error * max(MACHINE_RATE, 1.0 - math.exp(-used_s / MEMORY_S))
        self._machine += step
        error -= step
        self._now_s += used_s
        for end in range(1, len(path) + 1):
            error = self._kinds.setdefault(path[:end], _Correction()).learn(error, self._now_s)
        if len(self._kinds) > MOST_KINDS:  # a new dict: others may be asking
            latest = sorted(self._kinds.items(), key=lambda one: one[1].at_s)[-MOST_KINDS // 2 :]
            self._kinds = dict(latest)

    def _of_kind(self, path: Path) -> float:
        found = (self._kinds.get(path[:end]) for end in range(1, len(path) + 1))
        return sum(one.faded(self._now_s) for one in found if one is not None)


def uncorrected(plans: Sequence[Plan]) -> tuple[Path, float]:
    """(kind of work, predicted seconds without any correction) of one run: what a batch pays once counts once."""
    own_s = sum((plan.predicted_s - plan.shared_s) / plan.pace for plan in plans)
    seconds = own_s + max(plan.shared_s / plan.pace for plan in plans)
    if len(plans) == 1:
        return plans[0].path, seconds
    first, *_, form = plans[0].path
    return (first, octave(seconds), ("batch", form)), seconds


def octave(number: float) -> int:
    """Sizes within a factor of two have the same."""
    return math.frexp(number)[1]
