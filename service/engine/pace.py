"""How predicted seconds turn out, lately: what else the machine does changes faster than any calibration."""

from __future__ import annotations

import math

MEMORY_S = 10.0  # of device time
PRIOR_S = 1.0  # as if so much had run as predicted
BOUNDS = 0.25, 8.0


class Pace:
    """Seconds that a predicted second took, over the last ten seconds of work or so."""

    def __init__(self) -> None:
        self._predicted_s = self._used_s = 0.0

    @property
    def factor(self) -> float:
        low, high = BOUNDS
        return min(high, max(low, (self._used_s + PRIOR_S) / (self._predicted_s + PRIOR_S)))

    def learn(self, predicted_s: float, used_s: float) -> None:
        """A run has ended."""
        kept = math.exp(-used_s / MEMORY_S)
        self._predicted_s = kept * self._predicted_s + predicted_s
        self._used_s = kept * self._used_s + used_s
