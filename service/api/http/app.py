"""The ASGI application: all routes of one replica."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.http import attention, models, open_inference, text, usage
from service.api.http.endpoint import Access, Call, Http, Route
from service.api.http.responses import error_response, error_responses, json_response
from service.engine.engine import Engine
from service.errors import CODES, FarsightError, Kind
from service.telemetry import exporter
from service.telemetry.request_record import RequestRecord, failed


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
    open_inference.add_routes(app, http)
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
            with engine.trails.follow(RequestRecord(request_id, "http", "none", request.method, time.perf_counter())):
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
