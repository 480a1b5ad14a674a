"""How many replicas: enough for the running work, and enough to drain the queue in time.

Each replica reports its predicted seconds of waiting and running work, and the share of time its device was busy.
Numbers in, a number out: Ray Serve calls `policy`, tests call it directly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

AHEAD_S, BUSY = "farsight_ahead_s", "farsight_busy"  # keys under which replicas report
TARGET_BUSY = 0.7  # share of a device; the rest absorbs bursts
DRAIN_S = 10.0  # time in which a queue should drain


def desired_replicas(ahead_s: Sequence[float], busy: Sequence[float]) -> int:
    """Number of replicas, at least 1. For each replica: predicted seconds of its work, and its busy share in [0, 1]."""
    occupied = sum(busy) / TARGET_BUSY
    # a replica that is always busy cannot report how much more work there is: its queue does
    return max(1, math.ceil(occupied - 1e-9 + sum(ahead_s) / DRAIN_S))


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Custom policy of Ray Serve for a `ray.serve.config.AutoscalingContext`; Serve applies delays and bounds to it."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    ahead_s, busy = metrics.get(AHEAD_S, {}), metrics.get(BUSY, {})
    if not busy:  # no replica has reported yet
        return context.target_num_replicas, {}
    return desired_replicas(list(ahead_s.values()), list(busy.values())), {}
