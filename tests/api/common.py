"""What the tests of transports share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from service.api.http.app import App
from service.core.model_info import LayerKind, MatrixSizes, ModelInfo

INFO = ModelInfo(
    name="mini",
    task="embed",
    architecture="bert",
    dtype="float32",
    max_length=128,
    dimensions=3,
    state_dimensions=3,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=100,
    parameters=1000,
    hidden_size=4,
    intermediate_size=4,
    weights=MatrixSizes(100),
    task_weights=MatrixSizes(100),
    attention=(LayerKind(1, is_causal=False),),
    packed=True,
)


def caller(app: App) -> Callable[..., httpx.Response]:
    """`call(method, path, **arguments of httpx)`, in process."""

    def call(method: str, path: str, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    return call
