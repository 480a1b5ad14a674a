"""A tenant's short requests while another one sends inputs that take long to read: texts and images, priced or refused.

Two tenants of equal weight. The quiet one sends short texts and small images in an open loop, alone and next to the
loud one, which keeps three requests in flight from processes of its own. The image model has random weights: reading is
measured, not what is read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import uvloop

from benchmarks.client import Sample, drive, open_loop, poisson, post
from benchmarks.servers.lineup import MODEL
from benchmarks.servers.process import ours
from benchmarks.serving import percentile

HOST, IMAGE_MODEL = "127.0.0.1", "tiny-vit"
KEYS = {"quiet": "quiet-key", "loud": "loud-key"}
TEXT_BYTES, TEXTS, REPEATS = 1024**2 - 100, 5, 24
SIDE, IMAGES = 8192, 16  # 64 megapixels
WARM_UP = 50
DRY_RUN = "dry run"


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    rate: float = 10.0  # short requests a second, of each kind
    duration_s: float = 40.0
    first_port: int = 21700


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one kind of short request, and what became of the loud tenant's."""

    alone_p50_s: float
    alone_p99_s: float
    beside_p50_s: float
    beside_p99_s: float
    requests: int

    @property
    def bound_s(self) -> float:
        """Limit for the p99 next to the loud tenant."""
        return 2 * self.alone_p99_s + 0.05


@dataclass(frozen=True, slots=True)
class Report:
    """Figures by kind of short request; the loud tenant's answers by kind and status; its row of the ledger."""

    kinds: dict[str, Figures]
    loud: dict[str, int]
    usage: dict[str, Any]


def run(settings: Settings, model: Path, step: Callable[[str], None]) -> Report:
    """Start a service, and measure. Raises RuntimeError if a short request fails."""
    port = settings.first_port
    with TemporaryDirectory() as folder:
        vision = make_image_model(Path(folder) / IMAGE_MODEL)
        tenants = [
            {"name": name, "key_sha256": [hashlib.sha256(key.encode()).hexdigest()], "is_admin": name == "quiet"}
            for name, key in KEYS.items()
        ]
        own = {
            "FARSIGHT_TENANTS": orjson.dumps(tenants).decode(),
            "FARSIGHT_MODELS": orjson.dumps([{"name": IMAGE_MODEL, "path": str(vision)}]).decode(),
        }
        with ours(model, port, own, short_text(port)):
            return _measured(settings, port, step)


def _measured(settings: Settings, port: int, step: Callable[[str], None]) -> Report:
    shorts = {"text": short_text(port), "image": small_image(port)}
    for request in shorts.values():
        uvloop.run(drive(HOST, port, [request] * WARM_UP, 2))
    due = {
        kind: [(at_s, request) for at_s in poisson(settings.rate, settings.duration_s, seed)]
        for seed, (kind, request) in enumerate(shorts.items())
    }
    merged = sorted((at_s, kind, request) for kind, timed in due.items() for at_s, request in timed)
    step("the quiet tenant alone")
    alone = _by_kind(merged, uvloop.run(open_loop(HOST, port, [(at_s, request) for at_s, _, request in merged])))
    step("both")
    with loud_requests(port) as answered:
        both = _by_kind(merged, uvloop.run(open_loop(HOST, port, [(at_s, request) for at_s, _, request in merged])))
    figures = {
        kind: Figures(
            percentile(alone[kind], 0.5),
            percentile(alone[kind], 0.99),
            percentile(both[kind], 0.5),
            percentile(both[kind], 0.99),
            len(both[kind]),
        )
        for kind in due
    }
    rows = {row["tenant"]: row for row in _usage(port)["data"]}
    return Report(figures, dict(answered), rows.get("loud", {}))


def _by_kind(merged: list[tuple[float, str, bytes]], samples: list[Sample]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for (_, kind, _), sample in zip(merged, samples, strict=True):
        if sample.status != 200:
            raise RuntimeError(f"a short {kind} request failed: {sample.status} {sample.body[:200]!r}")
        found.setdefault(kind, []).append(sample.latency_s)
    return found


def short_text(port: int) -> bytes:
    body = {"model": MODEL, "input": "hello"}
    return post(HOST, port, "/v1/embeddings", orjson.dumps(body), headers=_key("quiet"))


def small_image(port: int) -> bytes:
    body = {"model": IMAGE_MODEL, "images": [png(32, 0)]}
    return post(HOST, port, "/v1/embeddings", orjson.dumps(body), headers=_key("quiet"))


def png(side: int, seed: int) -> str:
    """A white square with one grey pixel, in base64."""
    from PIL import Image

    image, buffer = Image.new("RGB", (side, side), "white"), io.BytesIO()
    image.putpixel((seed % side, 0), (seed % 256,) * 3)
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bombs() -> dict[str, Callable[[int], dict[str, Any]]]:
    """By name: the body of the loud tenant's n-th request of a kind."""
    word = "attention is paid "
    images = [png(SIDE, index) for index in range(IMAGES)]

    def text(index: int) -> str:
        return f"{index} {word * (TEXT_BYTES // len(word))}"

    def dry_run(count: int) -> dict[str, Any]:
        inputs = [text(TEXTS * count + index) for index in range(TEXTS)]
        return {"model": MODEL, "input": inputs, "truncate": "end"}

    def one_repeated(count: int) -> dict[str, Any]:
        return {"model": MODEL, "input": [text(count)] * REPEATS}  # too long: refused once it is read

    def large_images(_: int) -> dict[str, Any]:
        return {"model": IMAGE_MODEL, "images": images}

    return {DRY_RUN: dry_run, "repeated text": one_repeated, "large images": large_images}


@contextmanager
def loud_requests(port: int) -> Iterator[Counter[str]]:
    """Keep one of each bomb in flight during the block; the counter is filled at its end."""
    context = multiprocessing.get_context("spawn")
    stop, results = context.Event(), context.Queue()
    processes = [context.Process(target=_send_until, args=(port, name, stop, results)) for name in bombs()]
    for process in processes:
        process.start()
    for _ in processes:
        results.get(timeout=120)  # each is about to send its first one
    answered: Counter[str] = Counter()
    try:
        yield answered
    finally:
        stop.set()
        for process in processes:
            answered.update(results.get(timeout=300))
            process.join()


def _send_until(port: int, name: str, stop: Event, results: Any) -> None:
    os.nice(10)  # the client must not be what slows the others down
    make = bombs()[name]
    answered: Counter[str] = Counter()
    results.put(None)
    while not stop.is_set():
        body = make(answered.total())
        connection = HTTPConnection(HOST, port, timeout=300)
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEYS['loud']}"}
        if name == DRY_RUN:
            headers["x-dry-run"] = "true"
        connection.request("POST", "/v1/embeddings", orjson.dumps(body), headers)
        response = connection.getresponse()
        response.read()
        answered[f"{name}: {response.status}"] += 1
        if response.status == 429:
            time.sleep(min(1.0, float(response.headers.get("retry-after", 1))))
        connection.close()
    results.put(answered)


def _usage(port: int) -> Any:
    time.sleep(2.0)  # the ledger is written every second
    connection = HTTPConnection(HOST, port, timeout=30)
    connection.request("GET", "/v1/usage?group_by=tenant", headers={"authorization": f"Bearer {KEYS['quiet']}"})
    return orjson.loads(connection.getresponse().read())


def _key(tenant: str) -> str:
    return f"authorization: Bearer {KEYS[tenant]}\r\n"


def make_image_model(directory: Path) -> Path:
    """A ViT of two small layers with random weights."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory
