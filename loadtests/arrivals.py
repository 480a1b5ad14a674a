"""Arrival times of requests, drawn before the run. Open loop: a slow service does not reduce its load."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

BURSTS, BURST_SHARE, BURST_FACTOR = 3, 0.25, 5.0
QUIET = 1 / (BURST_SHARE * BURST_FACTOR + 1 - BURST_SHARE)
STEPS = (0.4, 0.8, 1.2, 1.6)


def _bursts(part: float) -> float:
    """In a quarter of each third of the run the rate is five times that of the rest."""
    return QUIET * (BURST_FACTOR if 0.5 <= BURSTS * part % 1 < 0.5 + BURST_SHARE else 1.0)


# factor of the mean rate, by the elapsed part of the run in [0, 1); the mean of each is 1
SHAPES: dict[str, Callable[[float], float]] = {
    "poisson": lambda _: 1.0,
    "bursts": _bursts,
    "steps": lambda part: STEPS[int(part * len(STEPS))],
    "diurnal": lambda part: 1 - 0.8 * math.cos(2 * math.pi * part),  # one day, as long as the run
}
EVEN = "even"  # equal gaps, the first request after half a gap: for few long requests


def draw(shape: str, rate: float, duration_s: float, seed: int) -> list[float]:
    """Arrival times in seconds in [0, duration_s), ascending: a Poisson process of rate x shape, by thinning."""
    if shape == EVEN:
        return [(index + 0.5) / rate for index in range(round(rate * duration_s))]
    intensity = SHAPES[shape]
    highest = max(intensity(index / 1000) for index in range(1000))
    generator = random.Random(seed)
    found: list[float] = []
    at_s = generator.expovariate(rate * highest)
    while at_s < duration_s:
        if generator.random() * highest < intensity(at_s / duration_s):
            found.append(at_s)
        at_s += generator.expovariate(rate * highest)
    return found
