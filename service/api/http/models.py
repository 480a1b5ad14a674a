"""Which models there are (OpenAI's `GET /v1/models`), and loading and unloading them (OIP's repository)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import (
    Access,
    Call,
    Handler,
    Http,
)
from service.api.http.responses import error_responses, json_response
from service.core.model_info import ModelInfo
from service.errors import FarsightError, Kind, invalid


def model_document(info: ModelInfo, created: int) -> dict[str, Any]:
    return {"object": "model", "created": created, "owned_by": "farsight", "id": info.name, **asdict(info)}


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine
    created = int(time.time())

    async def models(_: Call) -> Response:
        data = [model_document(info, created) for info in engine.model_infos()]
        return json_response({"object": "list", "data": data})

    async def model(call: Call) -> Response:
        name = call.path_params["name"]
        for info in engine.model_infos():
            if info.name == name:
                return json_response(model_document(info, created))
        raise FarsightError(Kind.NOT_FOUND, f"model {name[:96]!r} is not served", code="model_not_found", param="model")

    app.add_api_route(
        "/v1/models",
        http.endpoint("models", models),
        methods=["GET"],
        tags=["models"],
        summary="The transformers that are loaded, with their lengths and sizes",
        responses=error_responses(Kind.UNAUTHENTICATED),
    )
    app.add_api_route(
        "/v1/models/{name}",
        http.endpoint("models", model),
        methods=["GET"],
        tags=["models"],
        summary="One model",
        responses=error_responses(Kind.UNAUTHENTICATED, Kind.NOT_FOUND),
    )

    async def index(call: Call) -> Response:
        wanted = call.json(engine.config.max_json_bytes) if call.body else {}
        if wanted.keys() - {"ready"} or not isinstance(wanted.get("ready", False), bool):
            raise invalid('expected an empty body or {"ready": true}')
        rows = [
            {"name": name, "version": "1", "state": entry.state, "reason": entry.reason}
            for name, entry in engine.models.entries().items()
        ]
        return json_response([row for row in rows if row["state"] == "READY" or not wanted.get("ready")])

    async def load(call: Call) -> Response:
        await engine.load_model(call.path_params["name"])
        return json_response({})

    async def unload(call: Call) -> Response:
        await engine.unload_model(call.path_params["name"])
        return json_response({})

    def route(path: str, handler: Handler, summary: str, access: Access = Access.ADMINS) -> None:
        app.add_api_route(
            path,
            http.endpoint("repository", handler, v2=True, access=access),
            methods=["POST"],
            tags=["models"],
            summary=summary,
            responses=error_responses(Kind.UNAUTHENTICATED, Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.INVALID),
        )

    route("/v2/repository/index", index, "State of every model, and why one is not ready", Access.TENANTS)
    route("/v2/repository/models/{name}/load", load, "Load or reload a model; the one before serves until it is proven")
    route("/v2/repository/models/{name}/unload", unload, "Stop serving a model; what has begun ends")
