"""The requests of a run, from one seed: endpoints by weight, lengths by distribution or trace, times by `arrivals`."""

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
    """The value is the name in reports."""

    ATTENTION = "attention"  # HTTP, safetensors
    INFER = "grpc ModelInfer"  # the same tensors as raw contents
    EMBEDDINGS = "embeddings"  # HTTP, JSON


MIN_TOKENS, MAX_TOKENS = 64, 8192
MAX_WORDS = 128
POOL = 24  # bodies per endpoint and stream
CHAT, BOOK = (5.0, 0.7), (4096, 16384)  # mean and deviation of the logarithm; minimum and maximum
BOOK_SHARE = 0.1
LOGNORMAL = (6.2, 1.2)


def _between(low: float, high: float, part: float) -> float:
    return low * math.exp(math.log(high / low) * part)


def _lognormal(mean: float, deviation: float, part: float) -> float:
    return math.exp(NormalDist(mean, deviation).inv_cdf(min(max(part, 1e-6), 1 - 1e-6)))


def _bimodal(part: float) -> float:
    """Chats, and one book in ten requests."""
    if part < 1 - BOOK_SHARE:
        return _lognormal(*CHAT, part / (1 - BOOK_SHARE))
    return _between(*BOOK, (part - 1 + BOOK_SHARE) / BOOK_SHARE)


# quantile functions: from [0, 1) to tokens
LENGTHS: dict[str, Callable[[float], float]] = {
    "log-uniform": lambda part: _between(MIN_TOKENS, MAX_TOKENS, part),
    "lognormal": lambda part: min(MAX_TOKENS, _lognormal(*LOGNORMAL, part)),
    "bimodal": _bimodal,
    "words": lambda part: _between(1, MAX_WORDS, part),
}


@dataclass(frozen=True, slots=True)
class Stream:
    """A kind of callers. `lengths`: a name in LENGTHS, or a number of tokens; embeddings always use "words"."""

    rate: float  # mean requests/s
    endpoints: dict[Endpoint, float] = field(
        default_factory=lambda: {Endpoint.EMBEDDINGS: 2, Endpoint.ATTENTION: 1, Endpoint.INFER: 1}
    )
    lengths: str | int = "log-uniform"
    shape: str = "poisson"
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """A request before it is sent; its length in tokens (words for embeddings) selects one of the encoded bodies."""

    at_s: float
    endpoint: Endpoint
    length: int
    tenant: str = ""


def lengths(distribution: str | int, seed: int, count: int = POOL) -> list[int]:
    """`count` lengths, one from each equal part of the distribution, so that none is left out; ascending."""
    if isinstance(distribution, int):
        return [distribution]
    generator, quantile = random.Random(seed), LENGTHS[distribution]
    return [max(1, round(quantile((index + generator.random()) / count))) for index in range(count)]


def plan(streams: Sequence[Stream], duration_s: float, seed: int, scale: float = 1.0) -> list[Planned]:
    """All requests of a run, by time. Each stream has its own random draws; `scale` multiplies the rates."""
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
    return sorted(found, key=lambda planned: planned.at_s)


@lru_cache(1)  # read for every figure of a run
def span_s(trace: Path) -> float:
    """Seconds until the last request of a trace is due."""
    return max((entry.at_s for entry in read(trace)), default=0.0)


def plan_of(trace: Path, duration_s: float, scale: float = 1.0) -> list[Planned]:
    """The requests of a CSV as `farsight simulate` reads it; times are divided by `scale`.

    Lengths are rounded to 5 %, so that bodies can be encoded before the run. Raises ValueError if a line is invalid or
    no request is left.
    """
    entries = [entry for entry in read(trace) if entry.at_s / scale <= duration_s]
    if not entries:
        raise ValueError(f"{trace} has no requests within {duration_s:g} s")
    return [_planned(entry, scale, number) for number, entry in enumerate(entries)]


def _planned(entry: Entry, scale: float, number: int) -> Planned:
    """Attention alternates between both transports."""
    length = max(1, round(1.05 ** round(math.log(entry.tokens, 1.05))))
    endpoint = Endpoint.EMBEDDINGS if entry.model else (Endpoint.ATTENTION, Endpoint.INFER)[number % 2]
    tenant = "" if entry.tenant == "default" else entry.tenant
    return Planned(entry.at_s / scale, endpoint, length, tenant)
