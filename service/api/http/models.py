"""The loaded models (OpenAI's `GET /v1/models`), and loading and unloading them (Open Inference's repository)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import Access, Endpoint, HttpCall, HttpRoutes
from service.api.http.responses import error_responses, json_response
from service.api.service import InferenceService
from service.core.model_info import ModelInfo
from service.errors import FarsightError, Kind, invalid


class Models:
    """The endpoints about models."""

    def __init__(self, service: InferenceService) -> None:
        self._service, self._created_s = service, int(time.time())

    async def index(self, _: HttpCall) -> Response:
        data = [self._document(info) for info in self._service.model_infos()]
        return json_response({"object": "list", "data": data})

    async def model(self, call: HttpCall) -> Response:
        name = call.path_params["name"]
        for info in self._service.model_infos():
            if info.name == name:
                return json_response(self._document(info))
        raise FarsightError(Kind.NOT_FOUND, f"model {name[:96]!r} is not served", code="model_not_found", param="model")

    async def repository_index(self, call: HttpCall) -> Response:
        wanted = call.json(self._service.config.max_json_bytes) if call.body else {}
        if wanted.keys() - {"ready"} or not isinstance(wanted.get("ready", False), bool):
            raise invalid('expected an empty body or {"ready": true}')
        rows = [
            {"name": name, "version": "1", "state": entry.state, "reason": entry.reason}
            for name, entry in self._service.model_entries().items()
        ]
        return json_response([row for row in rows if row["state"] == "READY" or not wanted.get("ready")])

    async def load(self, call: HttpCall) -> Response:
        await self._service.load_model(call.path_params["name"])
        return json_response({})

    async def unload(self, call: HttpCall) -> Response:
        await self._service.unload_model(call.path_params["name"])
        return json_response({})

    def _document(self, info: ModelInfo) -> dict[str, Any]:
        return {"object": "model", "created": self._created_s, "owned_by": "farsight", "id": info.name, **asdict(info)}


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    endpoints = Models(routes.service)

    def add(path: str, endpoint: Endpoint, summary: str, *errors: Kind) -> None:
        app.add_api_route(
            path,
            routes.route("models", endpoint),
            methods=["GET"],
            tags=["models"],
            summary=summary,
            responses=error_responses(Kind.UNAUTHENTICATED, *errors),
        )

    add("/v1/models", endpoints.index, "The transformers that are loaded, with their lengths and sizes")
    add("/v1/models/{name:path}", endpoints.model, "One model", Kind.NOT_FOUND)

    def add_control(path: str, endpoint: Endpoint, summary: str, access: Access = Access.ADMINS) -> None:
        app.add_api_route(
            f"/v2/repository/{path}",
            routes.route("repository", endpoint, v2=True, access=access),
            methods=["POST"],
            tags=["models"],
            summary=summary,
            responses=error_responses(Kind.UNAUTHENTICATED, Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.INVALID, v2=True),
        )

    summary = "State of every model, and why one is not ready"
    add_control("index", endpoints.repository_index, summary, Access.TENANTS)
    summary = "Load or reload a model; the one before serves until the new one is proven"
    add_control("models/{name:path}/load", endpoints.load, summary)
    add_control("models/{name:path}/unload", endpoints.unload, "Stop serving a model; requests that have begun finish")
