"""What both transports do with a call, written once: run it, and turn whatever it raises into its one answer."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.api.service import InferenceService
from service.config import TenantConfig
from service.core.answer import Answer
from service.core.host_work import HostAsk, HostKind
from service.core.request import Request
from service.engine.pricing import Estimate
from service.errors import FarsightError, Kind, internal_error, malformed
from service.telemetry.logging import about
from service.telemetry.request_record import Received, RequestRecord

logger = logging.getLogger("farsight")

INLINE_BYTES = 64 * 1024  # parsing or writing more than this leaves the event loop
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

Form = TypeVar("Form")
Body = TypeVar("Body")
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one tenant, as endpoints of either transport see it."""

    id: str
    endpoint: str  # the route, as metrics, ledger and log line name it
    record: RequestRecord
    tenant: TenantConfig
    metadata: Mapping[str, str]  # HTTP headers or gRPC metadata, names in lower case

    @property
    def timeout_s(self) -> float | None:
        """Header or metadata x-request-timeout-seconds."""
        text = self.metadata.get("x-request-timeout-seconds")
        if text is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise malformed(
                f"x-request-timeout-seconds: expected a positive number, got {text[:32]!r}", param="timeout_s"
            )
        return seconds

    @property
    def is_dry_run(self) -> bool:
        """Header or metadata x-dry-run: the caller wants the price instead of the answer."""
        text = self.metadata.get("x-dry-run", "false").lower()
        if text not in ("true", "false"):
            raise malformed(f"x-dry-run: expected true or false, got {text[:32]!r}")
        return text == "true"


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Form]):
    """A request, and what else its answer's form depends on."""

    request: Request
    form: Form


@dataclass(frozen=True, slots=True)
class Exchange(Generic[Form, Body]):
    """How one endpoint reads a request, and writes its answer or its price."""

    parse: Callable[[], Parsed[Form]]
    body_bytes: int  # that `parse` reads
    render: Callable[[Answer, Parsed[Form]], Body]
    render_price: Callable[[Estimate, Parsed[Form]], Body]
    is_long: bool = False  # answers may be long besides their tensors
    is_json: bool = True  # what `parse` reads


def request_id(*candidates: str | None) -> str:
    """The first candidate that is a valid id, else a new one."""
    for candidate in candidates:
        if candidate and REQUEST_ID.fullmatch(candidate):
            return candidate
    return uuid.uuid4().hex


class Handler:
    """Serves the calls of one transport through the one service."""

    def __init__(self, service: InferenceService) -> None:
        self.service = service

    async def respond(
        self,
        received: Received,
        work: Callable[[RequestRecord], Awaitable[Body]],
        on_error: Callable[[FarsightError], Body],
        *,
        is_followed: bool,
    ) -> Body:
        """What `work` returns, or what `on_error` makes of the error it raised; recorded and counted once.

        `is_followed`: the request gets a log line and a trace if those are wanted.
        """
        record, recorder = RequestRecord(received), self.service.recorder
        try:
            with nullcontext() if recorder is None or not is_followed else recorder.follow(record):
                try:
                    return await work(record)
                except FarsightError as error:
                    failure = error
                except Exception as error:  # a bug: the caller gets the id, the log gets the rest
                    logger.error("request %s failed", received.id, exc_info=error, extra=about(received.id))
                    failure = internal_error(received.id)
                if record.fail(failure.kind, failure.code):  # else the engine has counted it
                    self.service.refused(received.endpoint, failure.kind)
                return on_error(failure)
        except asyncio.CancelledError:
            record.fail(Kind.CANCELLED)
            raise
        finally:
            self.service.charge_unanswered(record)

    async def answer(self, call: Call, exchange: Exchange[Form, Body]) -> Body:
        """Parse, run, render: large bodies and answers off the event loop. Raises FarsightError."""
        service = self.service
        call.record.is_dry_run = call.is_dry_run
        kind = HostKind.PARSE_JSON if exchange.is_json else HostKind.PARSE
        parsed = await self.parsed(call, exchange.body_bytes, exchange.parse, kind)
        if call.is_dry_run:
            return exchange.render_price(await service.priced(parsed.request, call.record), parsed)
        answer = await service.submit(parsed.request, call.record)
        size = sum(tensor.nbytes for tensor in answer.tensors.values())
        if exchange.is_long or size > INLINE_BYTES:
            ask = HostAsk(HostKind.RENDER, size, call.tenant.name, priority=parsed.request.options.priority)
            return await service.off_loop(call.record, ask, lambda _: exchange.render(answer, parsed))
        return exchange.render(answer, parsed)

    async def parsed(
        self, call: Call, size: int, parse: Callable[[], Read], kind: HostKind = HostKind.PARSE_JSON
    ) -> Read:
        """What `parse` makes of a body of `size` bytes. Raises FarsightError."""
        if size <= INLINE_BYTES:
            return parse()
        timeout_s = self.service.config.default_timeout_s if call.timeout_s is None else call.timeout_s
        deadline_s = call.record.received.received_s + timeout_s
        ask = HostAsk(kind, size, call.tenant.name, deadline_s=deadline_s)
        return await self.service.off_loop(call.record, ask, lambda _: parse())
