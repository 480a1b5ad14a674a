"""The ASGI application: all routes of one replica."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.api.handler import request_id
from service.api.http import attention, estimate, models, open_inference, operations, text, usage
from service.api.http.endpoint import HttpRoutes
from service.api.http.responses import error_response
from service.api.service import InferenceService
from service.errors import CODES, FarsightError, Kind
from service.telemetry.request_record import Received, RequestRecord


class App:
    """Calls busy routes directly; everything else goes through FastAPI.

    FastAPI's routing and middleware cost as much as a small request itself, and these endpoints use none of it; they
    are registered there too, for the OpenAPI text.
    """

    def __init__(self, fastapi: FastAPI, routes: HttpRoutes) -> None:
        self.fastapi, self._direct, self._id_is_echoed = fastapi, routes.direct, routes.id_is_echoed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._direct.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.fastapi(scope, receive, send if self._id_is_echoed else identified(scope, send))
            return
        response = await route(Request(scope, receive, send))
        await response(scope, receive, send)


def identified(scope: Scope, send: Send) -> Send:
    """`send` with the caller's request id or a new one: pages that are not routes of ours have none."""

    async def send_identified(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault(
                "x-request-id", request_id(Headers(scope=scope).get("x-request-id"))
            )
        await send(message)

    return send_identified


def create_app(service: InferenceService, *, id_is_echoed: bool = False) -> App:
    """`id_is_echoed`: what is in front of the application adds x-request-id to every answer."""
    app = FastAPI(
        title="Farsight",
        version=version("farsight"),
        description="Long-context attention and small transformers: planned, batched and priced per request.\n\n"
        + errors_table(),
        redirect_slashes=False,  # to the host that the caller names, without an id: 404 like every unknown route
    )
    routes = HttpRoutes(service, id_is_echoed=id_is_echoed)
    for part in (attention, estimate, text, models, open_inference, usage, operations):
        part.add_routes(app, routes)

    @app.exception_handler(HTTPException)
    async def _unrouted(request: Request, error: HTTPException) -> Response:
        response = _not_found(service, request, error, id_is_echoed=id_is_echoed)
        response.headers.update(error.headers or {})
        return response

    openapi = app.openapi

    def with_bodies() -> dict[str, Any]:
        document = openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(routes.schemas)
        return document

    app.openapi = with_bodies  # type: ignore[method-assign]  # as FastAPI's own documentation extends it
    return App(app, routes)


def _not_found(service: InferenceService, request: Request, error: HTTPException, *, id_is_echoed: bool) -> Response:
    """Unknown routes and methods, counted and answered like every other error."""
    kind = Kind.METHOD_NOT_ALLOWED if error.status_code == 405 else Kind.NOT_FOUND
    service.refused("none", kind)
    message = f"{request.method} {request.url.path[:128]}: {CODES[kind].meaning}"
    response = error_response(FarsightError(kind, message), v2=request.url.path.startswith("/v2"))
    received = Received(
        request_id(request.headers.get("x-request-id")), "http", "none", request.method, service.clock()
    )
    if not id_is_echoed:
        response.headers["x-request-id"] = received.id
    if service.recorder is not None:
        with service.recorder.follow(RequestRecord(received)) as record:
            record.fail(kind)
    return response


def errors_table() -> str:
    """The error table as Markdown, from the one table that the code answers by."""
    rows = [f"| {code.http} | {code.grpc} | {code.meaning} |" for code in CODES.values()]
    return "\n".join(["| HTTP | gRPC | meaning |", "|---|---|---|", *rows])
