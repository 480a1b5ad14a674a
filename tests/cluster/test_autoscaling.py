"""The number of replicas over a simulated day, by a fluid model of the queue."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from service.cluster.autoscaling import (
    AHEAD_S,
    BUSY,
    TARGET_BUSY,
    desired_replicas,
    policy,
)


@pytest.mark.parametrize(
    ("ahead_s", "busy", "replicas"),
    [
        ([0.0], [0.0], 1),
        ([0.0], [0.7], 1),
        ([0.0], [0.71], 2),
        ([0.0, 0.0], [0.35, 0.35], 1),
        ([5.0], [1.0], 2),
        ([30.0], [1.0], 5),
        ([30.0, 30.0], [1.0, 1.0], 9),
    ],
)
def test_running_work_and_the_queue_count(ahead_s: list[float], busy: list[float], replicas: int) -> None:
    assert desired_replicas(ahead_s, busy) == replicas


def test_a_day_with_a_burst_is_followed() -> None:
    """Load in device seconds a second: 2 at night, 18 at noon, and for ten minutes of the evening twice as much."""
    replicas, queue_s, step_s, start_up_s = 1, 0.0, 10.0, 30.0
    ordered: list[tuple[float, int]] = []
    waits, used, day = [], [], 86_400.0
    at_s = 0.0
    while at_s < day:
        load = 10 - 8 * math.cos(2 * math.pi * at_s / day)
        if 68_400 <= at_s < 69_000:
            load *= 2
        done = min(queue_s + load * step_s, replicas * step_s)
        queue_s += load * step_s - done
        busy = done / (replicas * step_s)
        wanted = desired_replicas([queue_s / replicas] * replicas, [busy] * replicas)
        ordered.append((at_s + start_up_s, wanted))
        if wanted < replicas:  # at once; Serve waits for its own delay
            replicas = wanted
        while ordered and ordered[0][0] <= at_s:
            replicas = max(replicas, ordered.pop(0)[1])
        waits.append(queue_s / replicas)
        used.append(load / replicas)
        at_s += step_s
    assert sorted(waits)[int(0.99 * len(waits))] < 5.0
    assert max(waits) < 60.0
    assert sum(used) / len(used) == pytest.approx(TARGET_BUSY, abs=0.08)


def test_nothing_changes_before_a_replica_reports() -> None:
    assert policy(SimpleNamespace(aggregated_metrics=None, target_num_replicas=3)) == (3, {})
    metrics = {AHEAD_S: {"a": 12.0, "b": 0.0}, BUSY: {"a": 1.0, "b": 0.4}}
    assert policy(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2)) == (4, {})
