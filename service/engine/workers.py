"""Threads next to the event loop for host work: parsing, tokenising, decoding images and audio, encoding answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple, Unpack

from service.device import side_pool

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Workers:
    """Two threads for text and bytes, one for images, one for audio: these may take seconds, and others cannot wait."""

    def __init__(self) -> None:
        self.parsers = side_pool(2, "parse")
        self._decoders = {kind: side_pool(1, kind) for kind in ("image", "audio")}

    def readers(self, inputs: str) -> ThreadPoolExecutor:
        """The threads that read inputs of a kind (`ModelInfo.inputs`)."""
        return self._decoders.get(inputs, self.parsers)

    async def run(self, function: Callable[[Unpack[Arguments]], Result], *arguments: *Arguments) -> Result:
        """Run parsing, tokenising or encoding off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.parsers, function, *arguments)

    def close(self) -> None:
        self.parsers.shutdown()
        for decoder in self._decoders.values():
            decoder.shutdown()
