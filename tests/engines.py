"""Engines for tests: another one with the same models and profile, and waiting for what its device does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from service.config import Config
from service.core.request import Request
from service.engine.engine import Engine
from service.engine.job import Job
from service.engine.replica import ReplicaDevice
from service.planning.device_profile import DeviceProfile
from service.scheduling.batch import Batch
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import Received, RequestRecord


def another(
    engine: Engine,
    config: Config | None = None,
    *,
    threads: int = 2,
    profile: DeviceProfile | None = None,
    metrics: Metrics | None = None,
    meter: Any = None,
    **parts: Any,
) -> Engine:
    """An engine on the CPU with the models of `engine`; its caller closes it."""
    replica = ReplicaDevice(torch.device("cpu"), profile or engine.profile, threads, meter)
    return Engine(config or engine.config, metrics or engine.metrics, engine.models, replica, **parts)


async def until_started(engine: Engine) -> None:
    """Until the next batch is on the device. To be awaited before anything else after its request was made."""
    await _called(engine, "on_started")


async def until_reported(engine: Engine) -> None:
    """Until the next batch has left the device and is accounted for."""
    await _called(engine, "on_reported")


async def _called(engine: Engine, hook: str) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    before: Callable[[Batch[Job]], None] | None = getattr(engine.execution, hook)
    setattr(engine.execution, hook, lambda _: loop.call_soon_threadsafe(event.set))
    try:
        async with asyncio.timeout(30):
            await event.wait()
    finally:
        setattr(engine.execution, hook, before)


def with_plan(job: Job, **changes: Any) -> Job:
    """The same job with another plan."""
    work = replace(job.work, plan=replace(job.work.plan, **changes))
    return replace(job, planned=replace(job.planned, work=work))


def record_of(request: Request) -> RequestRecord:
    """Of a request that came by no transport."""
    return RequestRecord(Received(request.id, "http", request.endpoint, request.endpoint, 0.0))
