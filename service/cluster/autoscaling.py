"""How many replicas: those that the running work occupies, and those that take the queue away in time.

Each replica tells its predicted seconds of waiting and running work, and the share of the time that its device worked.
Only numbers come in and go out: Ray Serve calls `policy`, a test may as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

AHEAD_S, BUSY = "farsight_ahead_s", "farsight_busy"  # as replicas report them
TARGET_BUSY = 0.7  # of a device; what is left absorbs bursts
DRAIN_S = 10.0  # in which a queue should be gone


def desired_replicas(ahead_s: Sequence[float], busy: Sequence[float]) -> int:
    """Of each replica: predicted seconds of its work, and the share of the time that it worked."""
    occupied = sum(busy) / TARGET_BUSY
    # a replica that is busy all the time cannot say how much more would come: its queue does
    return max(1, math.ceil(occupied - 1e-9 + sum(ahead_s) / DRAIN_S))


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's custom policy (of a `ray.serve.config.AutoscalingContext`); its delays and bounds come around it."""
    told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    ahead_s, busy = told.get(AHEAD_S, {}), told.get(BUSY, {})
    if not busy:  # nobody has reported yet
        return context.target_num_replicas, {}
    return desired_replicas(list(ahead_s.values()), list(busy.values())), {}
