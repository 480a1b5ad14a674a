"""What transports see of the engine, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from service.attention.output import Checkpoint
from service.billing.tenants import Tenants
from service.config import Config
from service.core.answer import Answer
from service.core.host_work import HostAsk
from service.core.model_info import ModelInfo
from service.core.options import AttentionOptions
from service.core.request import AttentionShape, Request
from service.engine.pricing import Estimate
from service.errors import Kind
from service.models.registry import Entry
from service.scheduling.inflight_bytes import HeldBytes
from service.telemetry.recorder import RequestRecorder
from service.telemetry.request_record import RequestRecord

Returned = TypeVar("Returned")


class InferenceService(Protocol):
    """Implemented by `engine.Engine`."""

    @property
    def config(self) -> Config: ...

    @property
    def tenants(self) -> Tenants: ...

    @property
    def hour_usd(self) -> float: ...

    @property
    def recorder(self) -> RequestRecorder | None:
        """Follows requests; None if neither log lines nor traces are wanted."""
        ...

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, from any beginning; the only clock of a request."""
        ...

    @property
    def alive(self) -> bool:
        """The device thread runs, and its device responds."""
        ...

    @property
    def ready(self) -> bool:
        """Alive, and the required models are loaded."""
        ...

    @property
    def not_ready(self) -> str:
        """What is missing."""
        ...

    async def submit(self, request: Request, record: RequestRecord | None = None) -> Answer:
        """The one answer of this request; raises FarsightError instead, and counts both."""
        ...

    async def priced(self, request: Request, record: RequestRecord | None = None) -> Estimate:
        """What it would cost; it does not run. Raises FarsightError."""
        ...

    def estimate(self, shape: AttentionShape, options: AttentionOptions, tenant: str = "default") -> Estimate:
        """The same for an attention request of these sizes."""
        ...

    async def off_loop(
        self, record: RequestRecord, ask: HostAsk, function: Callable[[Checkpoint], Returned]
    ) -> Returned:
        """Run parsing or encoding on a thread when its tenant's turn comes. Raises FarsightError.

        `function` may call its argument between parts of its work, which ends it if its caller has left.
        """
        ...

    def charge_unanswered(self, record: RequestRecord) -> None:
        """A transport is done with a request: if the device never got it, log what reading it used."""
        ...

    def check_open(self, tenant: str) -> None:
        """Raises FarsightError (429) before a large body is read that the queue would not accept."""
        ...

    @property
    def held_bytes(self) -> Callable[[], HeldBytes]:
        """Makes a context that counts body bytes as in flight while it is open."""
        ...

    def refused(self, endpoint: str, kind: Kind) -> None:
        """Count a request that its transport refused."""
        ...

    def model_infos(self) -> tuple[ModelInfo, ...]:
        """The models that answer."""
        ...

    def model_entries(self) -> Mapping[str, Entry]:
        """Every model that is known, with its state."""
        ...

    async def load_model(self, name: str) -> None:
        """Raises FarsightError."""
        ...

    async def unload_model(self, name: str) -> None:
        """Raises FarsightError."""
        ...

    async def usage(self, from_s: float, to_s: float, group_by: tuple[str, ...], tenant: str | None) -> dict[str, Any]:
        """What the ledger knows, of all tenants or one. Raises FarsightError."""
        ...
