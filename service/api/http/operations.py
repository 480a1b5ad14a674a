"""`/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import Access, HttpCall, HttpRoutes
from service.api.http.responses import error_response, error_responses, json_response
from service.errors import CODES, FarsightError, Kind
from service.telemetry import exporter


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    service = routes.service

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], responses={503: {"description": CODES[Kind.UNAVAILABLE].meaning}})
    async def readyz() -> Response:
        """Models are loaded and the device thread answers."""
        if not service.ready:
            return error_response(FarsightError(Kind.UNAVAILABLE, f"not ready: {service.not_ready}"))
        return json_response({"status": "ready", "models": [info.name for info in service.model_infos()]})

    async def metrics(_: HttpCall) -> Response:
        text = await service.off_loop(exporter.text, service.config.metrics_dir)
        return Response(text, media_type=exporter.CONTENT_TYPE)

    app.add_api_route(
        "/metrics",
        routes.route("metrics", metrics, access=Access.ADMINS),  # it names tenants and what they spend
        methods=["GET"],
        tags=["operations"],
        summary="Prometheus text, merged over the replicas of this node",
        responses=error_responses(Kind.UNAUTHENTICATED, Kind.FORBIDDEN),
    )
