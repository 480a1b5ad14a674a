"""The HTTP client of the benchmarks."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.client import Sample, open_loop


@pytest.mark.parametrize("header", ["", "connection: close\r\n"])
def test_a_connection_that_the_service_ends_is_not_used_again(header: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{header}content-length: 2\r\n\r\nok".encode())
        await writer.drain()
        writer.close()

    async def run() -> list[Sample]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            request = b"GET / HTTP/1.1\r\n\r\n"
            return await open_loop(host, port, [(0.1 * number, request) for number in range(3)])

    samples = asyncio.run(run())
    assert [(sample.status, sample.body) for sample in samples] == [(200, b"ok")] * 3
