"""`/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import Access, HttpCall, HttpRoutes
from service.api.http.responses import error_response, error_responses, json_response
from service.core.host_work import HostAsk, HostKind
from service.errors import FarsightError, Kind
from service.telemetry import exporter

METRICS_BYTES = 64 * 1024  # about, of the text; it decides only how its work is shared


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    service = routes.service

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], responses=error_responses(Kind.UNAVAILABLE))
    async def readyz() -> Response:
        """Models are loaded and the device thread answers."""
        if not service.ready:
            return error_response(FarsightError(Kind.UNAVAILABLE, f"not ready: {service.not_ready}"))
        return json_response({"status": "ready", "models": [info.name for info in service.model_infos()]})

    async def metrics(call: HttpCall) -> Response:
        ask = HostAsk(HostKind.RENDER, METRICS_BYTES, call.tenant.name)
        text = await service.off_loop(call.record, ask, lambda _: exporter.text(service.config.metrics_dir))
        return Response(text, media_type=exporter.CONTENT_TYPE)

    app.add_api_route(
        "/metrics",
        routes.route("metrics", metrics, access=Access.ADMINS),  # it names tenants and what they spend
        methods=["GET"],
        tags=["operations"],
        summary="Prometheus text, merged over the replicas of this node",
        responses={**error_responses(Kind.UNAUTHENTICATED, Kind.FORBIDDEN), 200: {"content": {"text/plain": {}}}},
    )
