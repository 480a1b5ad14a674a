"""The one door that both transports use: what a handler may ask of the engine."""

from __future__ import annotations

import re
from typing import Protocol

from service.billing.tenants import Tenants
from service.core.answer import Answer
from service.core.model_info import ModelInfo
from service.core.request import Request
from service.engine.engine import Estimate

INLINE_BYTES = 256 * 1024  # parsing or writing more than this leaves the event loop
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class InferenceService(Protocol):
    """Implemented by `engine.Engine`."""

    async def submit(self, request: Request, received_s: float | None = None) -> Answer:
        """The one answer of this request; raises FarsightError instead. `received_s`: perf_counter at its arrival."""
        ...

    async def priced(self, request: Request) -> Estimate:
        """What it would cost; it does not run."""
        ...

    def model_infos(self) -> tuple[ModelInfo, ...]: ...

    @property
    def tenants(self) -> Tenants: ...

    @property
    def hour_usd(self) -> float: ...

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...
