"""Overhead of the service for a request that computes almost nothing, compared with a plain uvicorn app."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import orjson
import uvloop

from benchmarks.client import drive, post

TINY = {"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]}

# parses and writes the same JSON, computes nothing, and has no proxy in front
PLAIN_APP = """
import json, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def attention(request):
    return JSONResponse({"output": json.loads(await request.body())["value"]})

app = Starlette(routes=[Route("/v1/attention", attention, methods=["POST"])])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the rounds."""

    p50_s: float
    requests_per_s: float


@contextlib.contextmanager
def plain_app() -> Iterator[int]:
    """Run a plain uvicorn server on a free port while the block runs. Raises RuntimeError if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen([sys.executable, "-c", PLAIN_APP, str(port)])
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("the plain uvicorn app did not start") from None
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


async def measure(host: str, port: int, rounds: int, requests: int) -> dict[str, Figures]:
    """Measure both servers in turn, round by round: p50 at concurrency 1, requests/s at 16."""
    body = orjson.dumps(TINY)
    latencies: dict[str, list[float]] = {"farsight": [], "plain uvicorn": []}
    rates: dict[str, list[float]] = {"farsight": [], "plain uvicorn": []}
    with plain_app() as plain_port:
        targets = {"farsight": (host, port), "plain uvicorn": ("127.0.0.1", plain_port)}
        for target in targets.values():  # warms up, and fails early
            await drive(*target, [post(*target, "/v1/attention", body)] * 200, 16)
        for _ in range(rounds):
            for name, target in targets.items():
                request = post(*target, "/v1/attention", body)
                _, singles = await drive(*target, [request] * (requests // 4), 1)
                took_s, _ = await drive(*target, [request] * requests, 16)
                latencies[name].append(median(singles))
                rates[name].append(requests / took_s)
    return {name: Figures(median(latencies[name]), median(rates[name])) for name in targets}


def run(host: str, port: int, rounds: int, requests: int) -> dict[str, Figures]:
    return uvloop.run(measure(host, port, rounds, requests))
