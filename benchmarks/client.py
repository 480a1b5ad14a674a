"""A keep-alive HTTP/1.1 client with little overhead, so that benchmarks measure the service and not the client."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True, slots=True)
class Exchange:
    """Answers, in the order of the requests."""

    took_s: float  # for all of them
    latencies_s: list[float]
    bodies: list[bytes]


class Connection(asyncio.Protocol):
    """One connection, one request at a time. A protocol, because streams cost several times as much."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self._buffer = b""
        self.is_open = True  # False once the service closes it or has announced that

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """(status, body) of one encoded request. Raises ConnectionError if the service closes the connection."""
        assert self._transport is not None, "bug: sent before it was connected"
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        assert self._transport is not None, "bug: closed before it was connected"
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the interface but not the base class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._waiting is None:
            return
        head = self._buffer[:end].lower() + b"\r\n"
        start = head.index(b"content-length:") + 15
        length = int(head[start : head.index(b"\r\n", start)])
        if len(self._buffer) < end + 4 + length:
            return
        body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
        self.is_open = b"\r\nconnection: close\r\n" not in head
        self._waiting.set_result((int(head[9:12]), body))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError("the service closed the connection"))


def post(
    host: str, port: int, path: str, body: bytes, media_type: str = "application/json", headers: str = ""
) -> bytes:
    """An encoded POST request that accepts answers of the same media type. `headers`: more lines, each with its end."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: {media_type}\r\naccept: {media_type}\r\n"
        f"{headers}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def drive(host: str, port: int, requests: Sequence[bytes], concurrency: int) -> tuple[float, list[float]]:
    """Send all requests over `concurrency` connections: (seconds for all, seconds of each). RuntimeError unless 200."""
    exchange = await exchanged(host, port, requests, concurrency)
    return exchange.took_s, exchange.latencies_s


async def exchanged(
    host: str, port: int, requests: Sequence[bytes], concurrency: int, timeout_s: float | None = None
) -> Exchange:
    """Closed loop: each connection sends a request when its last one is answered. RuntimeError unless all are 200."""
    waiting = iter(enumerate(requests))
    latencies_s = [0.0] * len(requests)
    bodies = [b""] * len(requests)

    async def worker(connection: Connection) -> None:
        for index, request in waiting:
            start = time.perf_counter()
            status, body = await connection.send(request)
            latencies_s[index] = time.perf_counter() - start
            if status != 200:
                raise RuntimeError(f"status {status}: {body[:200]!r}")
            bodies[index] = body

    connections: list[Connection] = []
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(concurrency):
                connections.append(await Connection.open(host, port))
            start = time.perf_counter()
            await asyncio.gather(*(worker(connection) for connection in connections))
            return Exchange(time.perf_counter() - start, latencies_s, bodies)
    finally:
        for connection in connections:
            connection.close()


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of an open-loop run; its latency counts from when it was due. Status 0: the connection failed."""

    at_s: float
    latency_s: float
    status: int
    body: bytes


async def open_loop(host: str, port: int, requests: Sequence[tuple[float, bytes]]) -> list[Sample]:
    """Send each request at its time, regardless of the others, over as many connections as needed."""
    idle: list[Connection] = []
    start_s = time.perf_counter() + 0.1

    async def send(at_s: float, request: bytes) -> Sample:
        await asyncio.sleep(start_s + at_s - time.perf_counter())
        connection = idle.pop() if idle else await Connection.open(host, port)
        if not connection.is_open:
            connection = await Connection.open(host, port)
        try:
            status, body = await connection.send(request)
        except ConnectionError as error:
            return Sample(at_s, time.perf_counter() - start_s - at_s, 0, repr(error).encode())
        latency_s = time.perf_counter() - start_s - at_s
        idle.append(connection)
        return Sample(at_s, latency_s, status, body)

    samples = await asyncio.gather(*(send(at_s, request) for at_s, request in requests))
    for connection in idle:
        connection.close()
    return samples


def poisson(rate: float, duration_s: float, seed: int) -> list[float]:
    """Arrival times in seconds of a Poisson process, ascending."""
    draw = random.Random(seed)
    at_s, found = draw.expovariate(rate), []
    while at_s < duration_s:
        found.append(at_s)
        at_s += draw.expovariate(rate)
    return found
