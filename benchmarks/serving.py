"""Requests/s and latencies of embeddings, compared with other servers of the same model, in turn, round by round."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import uvloop

from benchmarks.client import Exchange, exchanged, post
from benchmarks.servers.lineup import LINEUP, MODEL, Contender, Place
from benchmarks.servers.process import Unavailable, handling, install, running, versions
from benchmarks.throughput import texts

OURS = LINEUP[0].name
SAMPLE = 128  # texts of the warm-up, whose answers are compared; some exceed the model's length
LOAD_TIMEOUT_S = 1800.0  # after that a server counts as hanging

Vectors = npt.NDArray[np.float64]
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    rounds: int = 3
    requests: int = 512  # per round and server, one text each
    clients: int = 32
    first_port: int = 21300


@dataclass(frozen=True, slots=True)
class Round:
    """One server in one round, or the medians of several rounds."""

    requests_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A server in one round, and its embeddings [texts, width] of the sample."""

    round: Round
    vectors: Vectors


@dataclass(frozen=True, slots=True)
class Row:
    """One server."""

    name: str
    absent: str = ""  # why it was not measured; all other fields are then empty
    medians: Round | None = None
    lowest_cosine: float | None = None  # to Farsight's answers
    rounds: tuple[Round, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def run(
    settings: Settings, directory: Path, cache: Path, step: Step, lineup: Sequence[Contender] = LINEUP
) -> list[Row]:
    """Install all servers, then measure them in turn, round by round; every started server is stopped."""
    absent: dict[str, str] = {}
    pythons: dict[str, str] = {}
    runs: dict[str, list[Measured]] = {contender.name: [] for contender in lineup}
    with handling(signal.default_int_handler), TemporaryDirectory(prefix="farsight-bench-") as scratch:
        for contender in lineup:
            step(f"{contender.name}: install")
            with noted(contender.name, absent):
                pythons[contender.name] = install(contender, cache)
        for number in range(settings.rounds):
            for contender in lineup:
                step(f"{contender.name}: round {number + 1}")
                if contender.name not in absent:
                    folder = Path(scratch) / f"{contender.name}-{number}"
                    place = Place(pythons[contender.name], directory, settings.first_port, folder)
                    with noted(contender.name, absent):
                        runs[contender.name].append(measure(contender, place, settings))
    reference = next(iter(runs.get(OURS, ())), None)
    return [
        Row(contender.name, absent[contender.name])
        if contender.name in absent
        else row_of(contender.name, runs[contender.name], reference, versions(contender, pythons[contender.name]))
        for contender in lineup
    ]


def steps(settings: Settings, lineup: Sequence[Contender] = LINEUP) -> int:
    """Number of calls of `step`."""
    return len(lineup) * (settings.rounds + 1)


@contextmanager
def noted(name: str, absent: dict[str, str]) -> Iterator[None]:
    """Record why a contender drops out; the others continue."""
    try:
        yield
    except Unavailable as error:
        absent[name] = str(error)


def measure(contender: Contender, place: Place, settings: Settings) -> Measured:
    """Start and measure one server. Alone on the machine: idle, LitServe uses 0.2 cores and Ray 0.14."""
    requests = requests_of(contender, place.port, texts(settings.requests))
    with running(contender, place, requests[0]):
        sample = load(place.port, requests[:SAMPLE], settings.clients)  # also warms up
        loaded = load(place.port, requests, settings.clients)
    return Measured(round_of(loaded), vectors_of(sample.bodies))


def row_of(name: str, measured: Sequence[Measured], reference: Measured | None, versions: Mapping[str, str]) -> Row:
    rounds = tuple(result.round for result in measured)
    cosine = None if reference is None else lowest_cosine(reference.vectors, measured[0].vectors)
    return Row(name, "", medians(rounds), cosine, rounds, versions)


def requests_of(contender: Contender, port: int, sample: Sequence[str]) -> list[bytes]:
    bodies = (orjson.dumps({"model": MODEL, "input": text, **contender.options}) for text in sample)
    return [post("127.0.0.1", port, contender.path, body) for body in bodies]


def load(port: int, requests: Sequence[bytes], clients: int) -> Exchange:
    try:
        return uvloop.run(exchanged("127.0.0.1", port, requests, clients, LOAD_TIMEOUT_S))
    except (OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"failed under load: {type(error).__name__}: {error}") from error


def vectors_of(bodies: Sequence[bytes]) -> Vectors:
    """[texts, width] from answers in OpenAI's format. Raises Unavailable for other formats."""
    try:
        return np.array([orjson.loads(body)["data"][0]["embedding"] for body in bodies])
    except (ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"unexpected format of the answer: {bodies[0][:100]!r}") from error


def round_of(exchange: Exchange) -> Round:
    tails = (percentile(exchange.latencies_s, share) for share in (0.5, 0.95, 0.99))
    return Round(len(exchange.latencies_s) / exchange.took_s, *tails)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def medians(rounds: Sequence[Round]) -> Round:
    return Round(*(median(getattr(found, field.name) for found in rounds) for field in fields(Round)))


def lowest_cosine(ours: Vectors, theirs: Vectors) -> float:
    """Lowest cosine over the texts, [texts, width] each: 1 if both are equal, 0 if their shapes differ."""
    if ours.shape != theirs.shape:
        return 0.0
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Farsight divided by the best other server, for each figure: the most requests/s, the shortest latency."""
    ours = next((row.medians for row in rows if row.name == OURS), None)
    others = [row.medians for row in rows if row.medians is not None and row.name != OURS]
    if ours is None or not others:
        return {}
    found = {}
    for figure in fields(Round):
        best = max if figure.name == "requests_per_s" else min
        found[figure.name] = getattr(ours, figure.name) / best(getattr(other, figure.name) for other in others)
    return found


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """(name, requests/s, p50, p95, p99, lowest cosine); the ratios are the last row."""
    cells = [_cells(row) for row in rows]
    found = ratios(rows)
    if found:
        cells.append((f"{OURS} / best other", *(f"{ratio:.2f}x" for ratio in found.values()), ""))
    return cells


def _cells(row: Row) -> tuple[str, ...]:
    if row.medians is None:
        return row.name, "absent", "", "", "", ""
    latencies = (f"{1e3 * seconds:,.0f} ms" for seconds in (row.medians.p50_s, row.medians.p95_s, row.medians.p99_s))
    cosine = "" if row.lowest_cosine is None else f"{row.lowest_cosine:.6f}"
    return row.name, f"{row.medians.requests_per_s:.1f}", *latencies, cosine


def notes(rows: Sequence[Row]) -> list[str]:
    """Versions of each server, or why it is absent."""
    texts = (row.absent or ", ".join(f"{name} {number}" for name, number in row.versions.items()) for row in rows)
    return [f"{row.name}: {text}" for row, text in zip(rows, texts, strict=True)]


def figures(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that are written as JSON."""
    return {
        "settings": asdict(settings),
        "model": MODEL,
        "rows": [asdict(row) for row in rows],
        "against_best_other": ratios(rows),
    }
