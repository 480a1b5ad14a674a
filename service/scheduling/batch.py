"""What runs together on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic

from service.scheduling.fair_shares import Flow, Item


@dataclass(slots=True, eq=False)
class Batch(Generic[Item]):
    """Requests of one key, or one long request. The device thread keeps `used_s`."""

    items: list[Item]
    leaf: Flow[Item]
    is_long: bool
    predicted_s: float
    peak_bytes: int
    charges: list[tuple[Flow[Item], float]]  # seconds that each member's share was charged
    used_s: float = 0.0  # so far, without what ran in between
    is_idle: bool = False  # runs only while nothing else wants the device
    is_evicted: bool = False  # idle work must stop: no waiting request fits in memory next to it

    @property
    def remaining_s(self) -> float:
        """Predicted seconds that are left; a run over its prediction is not expected to end at once."""
        return max(self.predicted_s - self.used_s, 0.25 * self.used_s)


def idle_batch(item: Item) -> Batch[Item]:
    """Idle-priority batch; any request that fits in memory preempts it."""
    return Batch([item], Flow(1.0, None), True, math.inf, item.peak_bytes, [], is_idle=True)
