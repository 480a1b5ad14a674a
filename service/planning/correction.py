"""Corrections of predicted seconds, learned from runs: for each kind of work, and for the machine as a whole.

Calibration does not measure every shape, and the load of a machine changes all the time. A `WorkPath` names a kind of
work from the general to the specific, for example (dense, float32), the octave of its seconds, its exact form. Every
prefix of the path has a correction in log seconds, and so has the machine. The error of a run is distributed in that
order: each correction takes a part of the remainder, so that together they never overshoot, and a kind that has not run
yet is corrected by its general prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from service.core.plan import Plan

WorkPath = tuple[Hashable, ...]

# fitted to recorded runs of a machine with varying load from others: these leave the smallest errors
MEMORY_S = 1.0  # device time for which the machine's own correction is remembered
MACHINE_RATE, KIND_RATE = 0.25, 0.1  # smallest part of the remaining error that a correction takes
SURPRISE = 0.5  # log seconds: a larger error of one run counts as this
BOUNDS = math.log(0.25), math.log(8.0)
FADE_S = 600.0  # device time after which a correction has faded to 1/e, so that its kind may be chosen again
MOST_KINDS = 4096


@dataclass(slots=True)
class _Correction:
    log: float = 0.0
    runs: int = 0
    learned_s: float = 0.0  # total device time when it last learned

    def faded(self, now_s: float) -> float:
        return self.log * math.exp((self.learned_s - now_s) / FADE_S)

    def learn(self, error: float, now_s: float) -> float:
        """Take a part of `error` and return the rest. Two accurate runs are assumed before the first one."""
        step = error * max(KIND_RATE, 1.0 / (self.runs + 3))
        self.log, self.learned_s = self.faded(now_s) + step, now_s
        self.runs += 1
        return error - step


class PredictionCorrector:
    """Learns the ratio of actual to predicted seconds. One thread calls `learn`; any thread may call `factor`."""

    def __init__(self) -> None:
        self._machine = self._now_s = 0.0  # log seconds; total device time
        self._kinds: dict[WorkPath, _Correction] = {}

    def factor(self, path: WorkPath) -> float:
        """What to multiply predicted seconds of this kind of work with, within `BOUNDS`; 1 before anything ran."""
        low, high = BOUNDS
        return math.exp(min(high, max(low, self._machine + self._of_kind(path))))

    def learn(self, path: WorkPath, predicted_s: float, used_s: float) -> None:
        """Learn from a run of this kind. `predicted_s` is without any correction; both are device seconds."""
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
        if len(self._kinds) > MOST_KINDS:  # a new dict: other threads may read the old one
            latest = sorted(self._kinds.items(), key=lambda item: item[1].learned_s)[-MOST_KINDS // 2 :]
            self._kinds = dict(latest)

    def _of_kind(self, path: WorkPath) -> float:
        found = (self._kinds.get(path[:end]) for end in range(1, len(path) + 1))
        return sum(correction.faded(self._now_s) for correction in found if correction is not None)


def uncorrected(plans: Sequence[Plan]) -> tuple[WorkPath, float]:
    """(kind of work, predicted seconds without corrections) of one run of these plans. Shared seconds count once."""
    separate_s = sum((plan.predicted_s - plan.shared_s) / plan.correction for plan in plans)
    seconds = separate_s + max(plan.shared_s / plan.correction for plan in plans)
    if len(plans) == 1:
        return plans[0].path, seconds
    first, *_, form = plans[0].path
    return (first, octave(seconds), ("batch", form)), seconds


def octave(number: float) -> int:
    """The power of two above a number: sizes in the same octave differ by less than a factor of two."""
    return math.frexp(number)[1]
