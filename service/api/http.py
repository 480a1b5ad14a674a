"""HTTP plumbing: bodies limited while they stream, errors by the one table, operations. Decides nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.codec import Body, dump_json, error_document, parse_json
from service.api.door import INLINE_BYTES, REQUEST_ID
from service.billing.tenants import EVERYBODY, key_of
from service.config import TenantConfig
from service.engine.engine import Engine
from service.errors import CODES, FarsightError, Kind, malformed, retry_after, too_large
from service.telemetry import exporter
from service.telemetry.logging import about
from service.telemetry.trail import Trail, failed

logger = logging.getLogger("farsight")

JSON = "application/json"
MAX_DIGITS = 19  # of a content-length
BLOCK_BYTES = 1024 * 1024  # of an answer that is sent
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


class Answered(Response):
    """A response whose headers are all ours: encoded once, without Starlette's look at each of them.

    A body in parts is sent block by block, as fast as the caller reads: only a block of it lies in memory twice.
    """

    def __init__(
        self, body: bytes | Sequence[memoryview], headers: Mapping[str, str], media_type: str, status: int = 200
    ) -> None:
        self.parts = [memoryview(body)] if isinstance(body, bytes) else body
        self.status_code, self.background = status, None
        self.size = sum(part.nbytes for part in self.parts)
        self.held = ExitStack()  # until it is sent
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw += [(b"content-type", media_type.encode()), (b"content-length", str(self.size).encode())]
        self.raw_headers = raw

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self.size
            for part in self.parts:
                for start in range(0, part.nbytes, BLOCK_BYTES):
                    # bytes: Serve's own proxy, which stands in while replicas change, pickles them
                    block = bytes(part[start : start + BLOCK_BYTES])
                    left -= len(block)
                    await send({"type": "http.response.body", "body": block, "more_body": left > 0})
            if not self.size:
                await send({"type": "http.response.body", "body": b""})


class Access(StrEnum):
    """Whom a route answers, where the service has tenants."""

    EVERYBODY = "everybody"
    TENANTS = "tenants"
    ADMINS = "admins"


Handler = Callable[[Call], Awaitable[Response]]
Route = Callable[[Request], Awaitable[Response]]


def _trail(request: Request, endpoint: str, request_id: str, received_s: float) -> Trail:
    route = request.scope.get("route")  # none where a busy route is called directly: then the path has no variables
    return Trail(
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


def error_response(error: FarsightError, *, v2: bool = False) -> Response:
    after_s = error.retry_after_s
    headers = {} if after_s is None else {"retry-after": retry_after(after_s)}
    if error.kind is Kind.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    body = {"error": error.message} if v2 else error_document(error)
    return Response(dump_json(body), CODES[error.kind].http, headers, JSON)


def json_response(document: dict[str, Any] | list[Any], headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(document), 200, headers, JSON)


class App:
    """The ASGI application: busy routes are called directly, everything else goes through FastAPI.

    FastAPI's routing and middleware cost as much as a small request itself, and these handlers use none of it; they
    are registered there too, for the OpenAPI text.
    """

    def __init__(self, fastapi: FastAPI, direct: Mapping[tuple[str, str], Route]) -> None:
        self.fastapi, self._direct = fastapi, direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._direct.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.fastapi(scope, receive, send)
            return
        response = await route(Request(scope, receive, send))
        await response(scope, receive, send)


def create_app(engine: Engine, *, id_is_echoed: bool = False) -> App:
    """All routes of one replica."""
    from service.api import attention, models, text, usage, v2

    app = FastAPI(
        title="Farsight",
        version=version("farsight"),
        description="Long-context attention and small transformers: planned, batched and priced per request.\n\n"
        + errors_table(),
    )
    http = Http(engine, id_is_echoed=id_is_echoed)
    attention.add_routes(app, http)
    text.add_routes(app, http)
    models.add_routes(app, http)
    v2.add_routes(app, http)
    usage.add_routes(app, http)
    _add_operations(app, http)

    @app.exception_handler(HTTPException)
    async def _unrouted(request: Request, error: HTTPException) -> Response:
        """Unknown routes and methods, in the same form as every other error."""
        kind = Kind.METHOD_NOT_ALLOWED if error.status_code == 405 else Kind.NOT_FOUND
        engine.metrics.refused("none", kind)
        message = f"{request.method} {request.url.path[:128]}: {CODES[kind].meaning}"
        response = error_response(FarsightError(kind, message), v2=request.url.path.startswith("/v2"))
        request_id = uuid.uuid4().hex
        if not id_is_echoed:
            response.headers["x-request-id"] = request_id
        if engine.trails is not None:
            with engine.trails.follow(Trail(request_id, "http", "none", request.method, time.perf_counter())):
                failed(kind)
        response.headers.update(error.headers or {})
        return response

    openapi = app.openapi

    def with_bodies() -> dict[str, Any]:
        document = openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(http.schemas)
        return document

    app.openapi = with_bodies  # type: ignore[method-assign]  # as FastAPI's own documentation extends it
    return App(app, http.direct)


def _add_operations(app: FastAPI, http: Http) -> None:
    engine = http.engine

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], responses={503: {"description": CODES[Kind.UNAVAILABLE].meaning}})
    async def readyz() -> Response:
        """Models are loaded and the device thread answers."""
        if not engine.ready:
            return error_response(FarsightError(Kind.UNAVAILABLE, f"not ready: {engine.not_ready}"))
        return json_response({"status": "ready", "models": [info.name for info in engine.model_infos()]})

    async def metrics(_: Call) -> Response:
        text = await engine.off_loop(exporter.text, engine.config.metrics_dir)
        return Response(text, media_type=exporter.CONTENT_TYPE)

    app.add_api_route(
        "/metrics",
        http.endpoint("metrics", metrics, access=Access.ADMINS),  # it names tenants and what they spend
        methods=["GET"],
        tags=["operations"],
        summary="Prometheus text, merged over the replicas of this node",
        responses=error_responses(Kind.UNAUTHENTICATED, Kind.FORBIDDEN),
    )


def errors_table() -> str:
    """The error table as Markdown, from the one table that the code answers by."""
    rows = [f"| {code.http} | {code.grpc} | {code.meaning} |" for code in CODES.values()]
    return "\n".join(["| HTTP | gRPC | meaning |", "|---|---|---|", *rows])


def error_responses(*kinds: Kind) -> dict[int | str, dict[str, object]]:
    """For the OpenAPI text of one route."""
    return {CODES[kind].http: {"description": CODES[kind].meaning} for kind in kinds}


# what any route that takes work may answer
WORK_ERRORS = error_responses(*(kind for kind in Kind if kind not in (Kind.METHOD_NOT_ALLOWED, Kind.CANCELLED)))
