"""Traces of requests: read from CSV, or generated from a seed (Poisson, bursts, heavy tails, a daily cycle)."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from service.core.options import Priority

KINDS = ("poisson", "bursts", "heavy", "diurnal")
DAY_S = 86_400.0
BURST_S, QUIET_S, BURST_FACTOR = 10.0, 50.0, 5.0
SHORT = (4.0, 1.0, 512)  # tokens of texts, log-normal: mean and deviation of the logarithm, and the largest
LONG = (4096, 131_072)  # tokens of attention requests, log-uniform
LONG_SHARE, HEAVY_LONG_SHARE = 0.01, 0.05
TENANTS = (("free", 0.6), ("team", 0.3), ("enterprise", 0.1))


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a trace. Without a model it is causal attention with 8 heads of 64."""

    at_s: float  # seconds after the start of the trace
    tokens: int
    model: str = ""
    priority: Priority = Priority.INTERACTIVE
    tenant: str = "default"


def read(path: Path) -> Iterator[Entry]:
    """Read a CSV file with a header: at_s, tokens, and optionally model, priority, tenant; in order of at_s.

    Raises ValueError with the line of an unusable value, csv.Error if it is not CSV, OSError if it is not readable.
    """
    with path.open(newline="") as lines:
        last_s = 0.0
        for number, row in enumerate(csv.DictReader(lines, strict=True), 2):
            try:
                known = {field.name: row[field.name] for field in fields(Entry) if row.get(field.name)}
                at_s, tokens = float(known.pop("at_s")), int(known.pop("tokens"))
                priority = Priority(known.pop("priority", Priority.INTERACTIVE))
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not last_s <= at_s < math.inf or tokens < 1:
                expected = f"at_s of at least {last_s:g} and positive tokens"
                raise ValueError(f"{path}, line {number}: expected {expected}, got {at_s:g} and {tokens}")
            last_s = at_s
            yield Entry(at_s, tokens, priority=priority, **known)


def write(path: Path, trace: Iterable[Entry]) -> None:
    """Write a trace as the CSV that `read` takes. Raises OSError if the file is not writable."""
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow([field.name for field in fields(Entry)])
        writer.writerows(astuple(entry) for entry in trace)


def draw(kind: str, rate: float, count: int, model: str, seed: int = 0) -> Iterator[Entry]:
    """Generate `count` requests: texts for `model` and some long attention, at a mean rate of `rate` requests/s.

    `kind` is one of `KINDS`. The same seed gives the same trace.
    """
    generator = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    long_share = HEAVY_LONG_SHARE if kind == "heavy" else LONG_SHARE
    names, weights = [name for name, _ in TENANTS], [weight for _, weight in TENANTS]
    intensity = _INTENSITIES[kind]
    at_s = 0.0
    for _ in range(count):
        at_s += generator.expovariate(rate * intensity(at_s))
        tenant = generator.choices(names, weights)[0]
        priority = Priority.BATCH if generator.random() < 0.1 else Priority.INTERACTIVE
        if generator.random() < long_share:
            low, high = (math.log(tokens) for tokens in LONG)
            yield Entry(at_s, round(math.exp(generator.uniform(low, high))), "", priority, tenant)
        else:
            mean, deviation, most = SHORT
            tokens = min(most, max(4, round(generator.lognormvariate(mean, deviation))))
            yield Entry(at_s, tokens, model, priority, tenant)


def _bursts(at_s: float) -> float:
    """Relative rate with mean 1: in every minute, ten seconds of five times the quiet rate."""
    quiet = (BURST_S + QUIET_S) / (BURST_FACTOR * BURST_S + QUIET_S)
    return quiet * (BURST_FACTOR if at_s % (BURST_S + QUIET_S) < BURST_S else 1.0)


_INTENSITIES: dict[str, Callable[[float], float]] = {
    "poisson": lambda _: 1.0,
    "heavy": lambda _: 1.0,
    "bursts": _bursts,
    "diurnal": lambda at_s: 1.0 + 0.8 * math.sin(2 * math.pi * at_s / DAY_S),
}
