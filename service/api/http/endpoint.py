"""HTTP plumbing: bodies limited while they stream, errors by the one table, operations. Decides nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service.api.codec import Body, parse_json
from service.api.http.responses import BLOCK_BYTES, JSON, Answered, error_response
from service.api.service import INLINE_BYTES, REQUEST_ID
from service.billing.tenants import EVERYBODY, key_of
from service.config import TenantConfig
from service.engine.engine import Engine
from service.errors import CODES, FarsightError, Kind, malformed, too_large
from service.telemetry.logging import about
from service.telemetry.request_record import RequestRecord, failed

logger = logging.getLogger("farsight")

MAX_DIGITS = 19  # of a content-length
PROBES = ("v2",)  # asked every few seconds, and they use nothing: not followed


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request as handlers see it."""

    id: str
    headers: dict[str, str]
    body: Body
    path_params: dict[str, Any]
    received_s: float  # time.perf_counter() when the request's headers were here
    tenant: TenantConfig
    query_string: bytes = b""

    @property
    def timeout_s(self) -> float | None:
        """The header form of `timeout_s`."""
        text = self.headers.get("x-request-timeout-seconds")
        if text is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise malformed(f"x-request-timeout-seconds: {text[:32]!r} is not a positive number")
        return seconds

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.query_string.decode("latin-1"), keep_blank_values=True))

    @property
    def is_dry_run(self) -> bool:
        """The caller wants the price of the request instead of its answer."""
        text = self.headers.get("x-dry-run", "false").lower()
        if text not in ("true", "false"):
            raise malformed(f"x-dry-run: expected true or false, got {text[:32]!r}")
        return text == "true"

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", JSON).partition(";")[0].strip().lower()

    def json(self, max_bytes: int) -> dict[str, Any]:
        """The body as a JSON object."""
        if self.content_type != JSON:
            raise FarsightError(Kind.UNSUPPORTED_MEDIA, f"content-type {self.content_type[:64]!r} is not {JSON}")
        if len(self.body) > max_bytes:
            raise too_large("JSON body (binary tensors may be larger)", len(self.body), max_bytes, "bytes")
        return parse_json(self.body)


class Access(StrEnum):
    """Whom a route answers, where the service has tenants."""

    EVERYBODY = "everybody"
    TENANTS = "tenants"
    ADMINS = "admins"


Handler = Callable[[Call], Awaitable[Response]]
Route = Callable[[Request], Awaitable[Response]]


def _trail(request: Request, endpoint: str, request_id: str, received_s: float) -> RequestRecord:
    route = request.scope.get("route")  # none where a busy route is called directly: then the path has no variables
    return RequestRecord(
        request_id,
        "http",
        endpoint,
        f"{request.method} {request.scope['path'] if route is None else route.path}",
        received_s,
        request.headers.get("traceparent"),
        request.headers.get("tracestate"),
    )


class Http:
    """Shared by all routes of one replica."""

    def __init__(self, engine: Engine, *, id_is_echoed: bool) -> None:
        self.engine = engine
        self._id_is_echoed = id_is_echoed  # what is in front of us adds x-request-id to every answer
        self.direct: dict[tuple[str, str], Route] = {}
        self.schemas: dict[str, Any] = {}

    def body(self, model: type[BaseModel]) -> dict[str, Any]:
        """A reference to the schema of a body, for the OpenAPI text."""
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        self.schemas |= schema.pop("$defs", {})
        self.schemas[schema["title"]] = schema
        return {"schema": {"$ref": f"#/components/schemas/{schema['title']}"}}

    def endpoint(self, name: str, handle: Handler, *, v2: bool = False, access: Access = Access.TENANTS) -> Route:
        """A route that asks who calls, reads the body within the limits, and turns every error into its one answer."""

        async def route(request: Request) -> Response:
            received_s = time.perf_counter()
            given_id = request.headers.get("x-request-id", "")
            request_id = given_id if REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
            if (trails := self.engine.trails) is None or name in PROBES:
                response = await answered(request, request_id, received_s)
            else:
                with trails.follow(_trail(request, name, request_id, received_s)):
                    response = await answered(request, request_id, received_s)
            if not (self._id_is_echoed and request_id == given_id):
                response.headers["x-request-id"] = request_id
            elif "x-request-id" in response.headers:
                del response.headers["x-request-id"]
            return response

        async def answered(request: Request, request_id: str, received_s: float) -> Response:
            try:
                headers = dict(request.headers)
                tenant = self._caller(headers, access)
                with ExitStack() as held:
                    body = await self._read_in_time(request, held, tenant.name)
                    query = request.scope.get("query_string", b"")
                    call = Call(request_id, headers, body, request.path_params, received_s, tenant, query)
                    response = await handle(call)
                    if isinstance(response, Answered) and response.size > BLOCK_BYTES:
                        # sent after this block: what waits in memory for a slow reader is in flight, too
                        self.engine.admission.add(response.size)
                        held.callback(self.engine.admission.give_back, response.size)
                        response.held = held.pop_all()
                    return response
            except FarsightError as error:
                if not error.counted:
                    self.engine.metrics.refused(name, error.kind)
                failed(error.kind, error.code)
                return error_response(error, v2=v2)
            except ClientDisconnect:
                self.engine.metrics.refused(name, Kind.CANCELLED)
                failed(Kind.CANCELLED)
                return Response(status_code=CODES[Kind.CANCELLED].http)  # to nobody
            except Exception as error:
                logger.error("request %s failed", request_id, exc_info=error, extra=about(request_id))
                self.engine.metrics.refused(name, Kind.INTERNAL)
                failed(Kind.INTERNAL)
                bug = FarsightError(Kind.INTERNAL, f"internal error; request id {request_id}")
                return error_response(bug, v2=v2)

        return route

    def _caller(self, headers: Mapping[str, str], access: Access) -> TenantConfig:
        """Who calls, before anything of theirs is read: 401 where nobody knows, 403 where it takes an administrator."""
        if access is Access.EVERYBODY:
            return EVERYBODY
        tenant = self.engine.tenants.of(key_of(headers))
        if access is Access.ADMINS and not tenant.is_admin:
            raise FarsightError(Kind.FORBIDDEN, f"tenant {tenant.name!r} is no administrator")
        return tenant

    async def _read_in_time(self, request: Request, held: ExitStack, tenant: str) -> Body:
        """No upload holds its bytes for longer than a request may take."""
        limit_s = self.engine.config.default_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._read(request, held, tenant)
        except TimeoutError:
            message = f"the body was not here after {limit_s:g} s"
            raise FarsightError(Kind.DEADLINE, message, code="slow_upload") from None

    async def _read(self, request: Request, held: ExitStack, tenant: str) -> Body:
        """The whole body; its bytes count as in flight until `held` is closed."""
        limit = self.engine.config.max_request_bytes
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise FarsightError(Kind.UNSUPPORTED_MEDIA, f"content-encoding {encoding[:32]!r} is not accepted")
        text = request.headers.get("content-length", "")
        is_sized = text.isdecimal() and len(text) <= MAX_DIGITS and "transfer-encoding" not in request.headers
        declared = int(text) if is_sized else None
        if declared is not None and declared > limit:
            raise too_large("request body", declared, limit, "bytes")
        if declared is None or declared > INLINE_BYTES:
            self.engine.check_open(tenant)  # before it is sent for nothing
        admission, size = self.engine.admission, 0
        held.callback(lambda: admission.give_back(size))
        body = bytearray()
        # of a known size: memory that is not touched before its bytes come, so that nothing grows and moves
        whole = None if declared is None else np.empty(declared, np.uint8).data
        async for chunk in request.stream():
            if size + len(chunk) > limit:
                raise too_large("request body", size + len(chunk), limit, "bytes")
            # counted as they arrive: a sender who only promises bytes takes nobody's room
            admission.take(len(chunk), self.engine.ahead_s)
            size += len(chunk)
            if len(chunk) == declared:
                return chunk
            if whole is None:
                body += chunk
            elif size <= whole.nbytes:
                whole[size - len(chunk) : size] = chunk
        if declared is not None and size != declared:  # what was not written to is somebody else's memory
            raise malformed(f"the body has {size} bytes, its content-length says {declared}")
        return body if whole is None else whole
