"""How far the attention layers of one pass may be off, so that the last hidden state keeps to the caller's bound.

A small error of one layer's attention output reaches the last hidden state multiplied by the layer's gain, which is
measured at load (`loading/gains.py`). Errors of different layers add up like independent ones, nearly: what sparse
attention does was measured to add up to 1.2 to 1.7 times as much (SmolLM2-135M, real text, 4,096 to 32,768 tokens), so
both the estimate and the upper limit are COHERENCE times what independent errors would give. Of all rows together:
single rows may be several times further off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt

from service.core.answer import LayerReport

COHERENCE = 1.65  # how much more the layers' errors add up to than independent ones
MAX_LAYER_ERROR = 0.2  # up to here errors of layers were seen to grow linearly into the output
AIM = 0.75  # of a call's part: the audit's upper limit is about so much above what leaves are chosen for
# a call may err more than its part, if the audit finds so, up to this many times and this share of all that is left:
# that costs less than computing it again
TOLERANCE, MOST_OF_LEFT = 2.0, 0.5
# a layer's part of the budget grows with its gain to this power: what a layer costs falls about as its error grows, and
# then the sum of costs is least
SHARE_EXPONENT = 2 / 3


@dataclass(frozen=True, slots=True)
class OutputBudget:
    """The error that one pass may have, spent call by call: what a call leaves over, the next ones may use."""

    gains: tuple[float, ...]  # of each attention call of a pass, in order; positive
    max_error: float  # of the last hidden state, relative L2

    def layer_error(self, done: Sequence[LayerReport]) -> tuple[float, float]:
        """(aim, bound) of the next attention call. `done`: the earlier ones, of earlier passes too."""
        call = len(done) % len(self.gains)
        spent = hypot(*self._uppers(done[len(done) - call :]))
        left = max(0.0, (self.max_error / COHERENCE) ** 2 - spent**2)
        shares = [gain**SHARE_EXPONENT for gain in self.gains[call:]]
        part = shares[0] / sum(shares)
        most = max(part, min(TOLERANCE**2 * part, MOST_OF_LEFT))
        own, bound = (min(MAX_LAYER_ERROR, sqrt(left * share) / self.gains[call]) for share in (part, most))
        return AIM * own, bound

    def output_error(self, done: Sequence[LayerReport]) -> tuple[float, float]:
        """(estimate, upper limit) of the relative L2 error of the last hidden state, of the worst pass."""
        count = len(self.gains)
        passes = [done[start : start + count] for start in range(0, len(done), count)]
        estimate = max(COHERENCE * hypot(*self._estimates(one)) for one in passes)
        return estimate, max(COHERENCE * hypot(*self._uppers(one)) for one in passes)

    def _estimates(self, one_pass: Sequence[LayerReport]) -> list[float]:
        return [gain * call.error.relative_l2 for gain, call in zip(self.gains, one_pass, strict=False)]

    def _uppers(self, one_pass: Sequence[LayerReport]) -> list[float]:
        return [gain * call.error.relative_l2_upper for gain, call in zip(self.gains, one_pass, strict=False)]
