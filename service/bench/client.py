"""A keep-alive HTTP/1.1 client that costs little, so that the service is measured and not the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence


class Connection:
    """One connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        return cls(*await asyncio.open_connection(host, port, limit=1 << 26))

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """(status, body) of one prebuilt request."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        lowered = head.lower()
        start = lowered.index(b"content-length:") + 15
        length = int(lowered[start : lowered.index(b"\r\n", start)])
        return status, await self._reader.readexactly(length)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


def post(host: str, port: int, path: str, body: bytes) -> bytes:
    """A JSON POST as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def drive(host: str, port: int, requests: Sequence[bytes], concurrency: int) -> tuple[float, list[float]]:
    """Send all requests over `concurrency` connections: (seconds for all, seconds of each). Any non-200 raises."""
    waiting = iter(requests)
    latencies_s: list[float] = []

    async def worker(connection: Connection) -> None:
        for request in waiting:
            start = time.perf_counter()
            status, body = await connection.send(request)
            latencies_s.append(time.perf_counter() - start)
            if status != 200:
                raise RuntimeError(f"status {status}: {body[:200]!r}")

    connections = [await Connection.open(host, port) for _ in range(concurrency)]
    try:
        start = time.perf_counter()
        await asyncio.gather(*(worker(connection) for connection in connections))
        return time.perf_counter() - start, latencies_s
    finally:
        for connection in connections:
            await connection.close()
