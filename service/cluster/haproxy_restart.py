"""HAProxy that dies is started again at once; runs in every process of Ray that `farsight serve` starts.

Ray notices after three failed health checks of its manager, then replaces the manager, and the new one starts HAProxy
without routes: half a minute without answers. The manager is HAProxy's parent and knows at once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve._private.haproxy import HAProxyApi

logger = logging.getLogger("ray.serve")


def install() -> None:
    """Replace the methods of Ray that start, reload and stop HAProxy; a process has at most one HAProxy."""
    start, reload, stop = HAProxyApi._start_and_wait_for_haproxy, HAProxyApi._graceful_reload, HAProxyApi.stop
    lock = asyncio.Lock()  # one of them at a time
    watches: set[asyncio.Task[None]] = set()  # the event loop itself keeps no reference

    async def watched(self: HAProxyApi, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(self, *arguments, **options)
        watch = asyncio.create_task(restart(self, process))
        watches.add(watch)
        watch.add_done_callback(watches.discard)
        return process

    async def restart(self: HAProxyApi, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        async with lock:
            if self._proc is not process:  # replaced by a reload, or stopped
                return
            logger.error(f"HAProxy died with {process.returncode}; starting it again")
            try:
                self._generate_config_file_internal()
                self._proc = await watched(self)
            except Exception:  # whatever Ray raises: its health check finds HAProxy dead, too
                logger.exception("HAProxy was not started again")

    async def reloaded(self: HAProxyApi) -> None:
        async with lock:
            if self._proc is not None and self._proc.returncode is not None:
                self._proc = await watched(self)  # with the configuration that was just written
            else:
                await reload(self)

    async def stopped(self: HAProxyApi) -> None:
        async with lock:
            await stop(self)

    HAProxyApi._start_and_wait_for_haproxy = watched  # type: ignore[method-assign]
    HAProxyApi._graceful_reload = reloaded  # type: ignore[method-assign]
    HAProxyApi.stop = stopped  # type: ignore[method-assign]
