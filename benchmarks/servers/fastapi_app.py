"""sentence-transformers behind FastAPI. Runs in its own venv: python fastapi_app.py MODEL PORT MAX_BATCH"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Body(BaseModel):
    input: str


class Batcher:
    """Runs at most `max_batch` waiting texts in a thread, while the next ones collect."""

    def __init__(self, directory: str, max_batch: int) -> None:
        self._model = SentenceTransformer(directory, device="cpu")
        self._max_batch = max_batch
        self._queue: asyncio.Queue[tuple[str, asyncio.Future[list[float]]]] = asyncio.Queue()

    async def embed(self, text: str) -> list[float]:
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((text, answer))
        return await answer

    async def run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            vectors = await asyncio.to_thread(self._encode, [text for text, _ in batch])
            for (_, answer), vector in zip(batch, vectors, strict=True):
                if not answer.done():  # the client has disconnected
                    answer.set_result(vector.tolist())

    def _encode(self, texts: list[str]) -> Any:
        return self._model.encode(texts, batch_size=self._max_batch, show_progress_bar=False)


def application(batcher: Batcher) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/embeddings")
    async def embeddings(body: Body) -> dict[str, Any]:
        return {"data": [{"embedding": await batcher.embed(body.input)}]}

    return app


def main() -> None:
    directory, port, max_batch = sys.argv[1:]
    batcher = Batcher(directory, int(max_batch))
    uvicorn.run(application(batcher), host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
