"""What the tests of spans and log lines share: an engine that follows requests, asked over both transports."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from service.api.grpc.methods import GrpcMethods
from service.api.handler import Handler
from service.api.http.app import App, create_app
from service.engine.engine import Engine
from tests.engines import another, until_reported, until_started

SMALL = {"query": [[[1.0, 0.0]]], "key": [[[1.0, 0.0], [0.0, 1.0]]], "value": [[[123.5, 2.0], [3.0, 4.0]]]}


@contextmanager
def engine_like(engine: Engine, **changes: Any) -> Iterator[Engine]:
    """Another one with the same models and profile."""
    meter = changes.pop("meter", None)
    config = engine.config.model_copy(update=changes)
    other = another(engine, config, threads=torch.get_num_threads(), meter=meter)
    try:
        yield other
    finally:
        other.close()


class Grpc(GrpcMethods):
    def __init__(self, engine: Engine) -> None:
        self.handler = Handler(engine)


async def ask(app: App, path: str, body: Any = SMALL, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, json=body, headers=named)


def post(engine: Engine, path: str, body: Any = SMALL, **headers: str) -> httpx.Response:
    return asyncio.run(ask(create_app(engine), path, body, **headers))


def long_body(length: int, heads: int = 8) -> dict[str, Any]:
    """Some hundred milliseconds of work in a small body: zeros."""

    def zeros(*shape: int) -> dict[str, Any]:
        data = base64.b64encode(bytes(4 * torch.Size(shape).numel())).decode()
        return {"dtype": "float32", "shape": list(shape), "data": data}

    return {name: zeros(heads, length, 8) for name in ("query", "key", "value")} | {"mode": "chunked"}


async def leave_while_it_runs(engine: Engine) -> None:
    """A caller over HTTP whose request has begun, and who goes."""
    task = asyncio.create_task(ask(create_app(engine), "/v1/attention", long_body(8192), x_request_id="left"))
    await until_started(engine)
    reported = asyncio.create_task(until_reported(engine))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await reported
