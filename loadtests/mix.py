"""What is sent: endpoints by weight, lengths by a distribution or a trace, when by `arrivals`; all from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

from loadtests import arrivals
from service.simulate.traces import Entry, read


class Endpoint(StrEnum):
    """The value is how reports call it."""

    ATTENTION = "attention"  # HTTP, safetensors
    INFER = "grpc ModelInfer"  # the same tensors as raw contents
    EMBEDDINGS = "embeddings"  # HTTP, JSON


MIN_TOKENS, MAX_TOKENS = 64, 8192
MAX_WORDS = 128
POOL = 24  # bodies of one endpoint and stream
CHAT, BOOK = (5.0, 0.7), (4096, 16384)  # mean and deviation of the logarithm; from, to
BOOK_SHARE = 0.1
LOGNORMAL = (6.2, 1.2)


def _between(low: float, high: float, part: float) -> float:
    return low * math.exp(math.log(high / low) * part)


def _lognormal(mean: float, deviation: float, part: float) -> float:
    return math.exp(NormalDist(mean, deviation).inv_cdf(min(max(part, 1e-6), 1 - 1e-6)))


def _bimodal(part: float) -> float:
    """Chat, and one book in ten."""
    if part < 1 - BOOK_SHARE:
        return _lognormal(*CHAT, part / (1 - BOOK_SHARE))
    return _between(*BOOK, (part - 1 + BOOK_SHARE) / BOOK_SHARE)


# quantile functions: [0, 1) to tokens
LENGTHS: dict[str, Callable[[float], float]] = {
    "log-uniform": lambda part: _between(MIN_TOKENS, MAX_TOKENS, part),
    "lognormal": lambda part: min(MAX_TOKENS, _lognormal(*LOGNORMAL, part)),
    "bimodal": _bimodal,
    "words": lambda part: _between(1, MAX_WORDS, part),
}


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of callers. `lengths`: a name of LENGTHS, or one number of tokens; embeddings always draw "words"."""

    rate: float  # requests/s in the mean
    endpoints: dict[Endpoint, float] = field(
        default_factory=lambda: {Endpoint.EMBEDDINGS: 2, Endpoint.ATTENTION: 1, Endpoint.INFER: 1}
    )
    lengths: str | int = "log-uniform"
    shape: str = "poisson"
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request, before it is sent: `length` tokens (words of embeddings), one of its endpoint's prepared bodies."""

    at_s: float
    endpoint: Endpoint
    length: int
    tenant: str = ""


def lengths(distribution: str | int, seed: int, count: int = POOL) -> list[int]:
    """One from each equal slice of the distribution, so that no part of it is left out; ascending."""
    if isinstance(distribution, int):
        return [distribution]
    generator, quantile = random.Random(seed), LENGTHS[distribution]
    return [max(1, round(quantile((index + generator.random()) / count))) for index in range(count)]


def plan(streams: Sequence[Stream], duration_s: float, seed: int, scale: float = 1.0) -> list[Planned]:
    """Every request of a run, by time; each stream has draws of its own, and `scale` times its rate."""
    found: list[Planned] = []
    for number, stream in enumerate(streams):
        generator = random.Random(f"{seed} {number}")
        names, weights = list(stream.endpoints), list(stream.endpoints.values())
        pools = {
            name: lengths("words" if name is Endpoint.EMBEDDINGS else stream.lengths, seed + number) for name in names
        }
        for at_s in arrivals.draw(stream.shape, scale * stream.rate, duration_s, seed + 1000 * number):
            name = generator.choices(names, weights)[0]
            found.append(Planned(at_s, name, generator.choice(pools[name]), stream.tenant))
    return sorted(found, key=lambda one: one.at_s)


@lru_cache(1)  # asked for with every figure of a run
def span_s(trace: Path) -> float:
    """When its last request is due."""
    return max((one.at_s for one in read(trace)), default=0.0)


def plan_of(trace: Path, duration_s: float, scale: float = 1.0) -> list[Planned]:
    """Of a CSV as `farsight simulate` reads it; `scale` shortens its gaps. Lengths are rounded to 5 %, so that bodies
    can be prepared. ValueError: a line is wrong, or nothing is left."""
    entries = [one for one in read(trace) if one.at_s / scale <= duration_s]
    if not entries:
        raise ValueError(f"{trace} has no requests within {duration_s:g} s")
    return [_planned(one, scale, number) for number, one in enumerate(entries)]


def _planned(entry: Entry, scale: float, number: int) -> Planned:
    """Attention takes both transports in turn."""
    length = max(1, round(1.05 ** round(math.log(entry.tokens, 1.05))))
    endpoint = Endpoint.EMBEDDINGS if entry.model else (Endpoint.ATTENTION, Endpoint.INFER)[number % 2]
    tenant = "" if entry.tenant == "default" else entry.tenant
    return Planned(entry.at_s / scale, endpoint, length, tenant)
