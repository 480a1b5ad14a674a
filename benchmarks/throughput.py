"""Texts of mixed length: sequential, from many concurrent clients, and sentence-transformers in one call."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import orjson
import uvloop

from benchmarks.client import Connection, drive, post

WORDS = (
    *("attention", "compares", "every", "token", "with", "every", "other", "and", "somebody", "pays", "for", "each"),
    *("long", "documents", "short", "questions", "batch", "queue", "device", "sparse", "dense", "exact", "error"),
    *("measured", "money", "energy", "memory", "time", "of", "those", "comparisons", "in"),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds for the same texts, medians over the rounds, and the lowest cosine to sentence-transformers."""

    one_by_one_s: float
    concurrent_s: float
    sentence_transformers_s: float
    lowest_cosine: float
    tokens: int


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of lognormal length, 4 to about 400 tokens."""
    generator = random.Random(seed)
    lengths = [min(398, max(2, round(generator.lognormvariate(4.0, 1.0)))) for _ in range(count)]
    return [" ".join(generator.choices(WORDS, k=length)) for length in lengths]


def run(host: str, port: int, model: str, directory: Path, rounds: int, count: int, clients: int) -> Figures:
    """Embed the same texts in three ways, in turn, round by round."""
    from sentence_transformers import SentenceTransformer

    info = uvloop.run(_get(host, port, f"/v1/models/{model}"))
    yardstick = SentenceTransformer(str(directory), device="cpu")
    yardstick.max_seq_length = info["max_length"]
    sample = texts(count)
    bodies = [orjson.dumps({"model": model, "input": text, "truncate": "end"}) for text in sample]
    requests = [post(host, port, "/v1/embeddings", body) for body in bodies]
    timings: dict[str, list[float]] = {"one": [], "many": [], "yardstick": []}
    for round_number in range(rounds + 1):
        one_s, _ = uvloop.run(drive(host, port, requests, 1))
        many_s, _ = uvloop.run(drive(host, port, requests, clients))
        start = time.perf_counter()
        expected = yardstick.encode(sample, batch_size=32, show_progress_bar=False)
        yardstick_s = time.perf_counter() - start
        if round_number:  # the first is the warm-up
            timings["one"].append(one_s)
            timings["many"].append(many_s)
            timings["yardstick"].append(yardstick_s)
    got, tokens = uvloop.run(_embeddings(host, port, requests))
    cosines = [
        sum(a * b for a, b in zip(ours, theirs, strict=True)) for ours, theirs in zip(got, expected, strict=True)
    ]
    return Figures(
        median(timings["one"]), median(timings["many"]), median(timings["yardstick"]), float(min(cosines)), tokens
    )


async def _get(host: str, port: int, path: str) -> dict[str, int]:
    connection = await Connection.open(host, port)
    status, body = await connection.send(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    connection.close()
    if status != 200:
        raise RuntimeError(f"{path}: status {status}: {body[:200]!r}")
    document: dict[str, int] = orjson.loads(body)
    return document


async def _embeddings(host: str, port: int, requests: list[bytes]) -> tuple[list[list[float]], int]:
    connection = await Connection.open(host, port)
    vectors, tokens = [], 0
    for request in requests:
        _, body = await connection.send(request)
        document = orjson.loads(body)
        vectors.append(document["data"][0]["embedding"])
        tokens += document["usage"]["total_tokens"]
    connection.close()
    return vectors, tokens
