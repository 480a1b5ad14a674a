"""The Open Inference Protocol over HTTP: routes only, `oip` knows the protocol."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from service.api.answer import estimate_document, headers
from service.api.http.endpoint import (
    Access,
    Call,
    Handler,
    Http,
)
from service.api.http.responses import (
    JSON,
    WORK_ERRORS,
    Answered,
    error_responses,
    json_response,
)
from service.api.open_inference import http_body as oip_http
from service.api.open_inference import metadata
from service.api.open_inference import protocol as oip
from service.api.service import INLINE_BYTES
from service.core.request import Request
from service.errors import FarsightError, Kind, malformed

HEADER_LENGTH = "inference-header-content-length"
BINARY = "application/octet-stream"


def header_length(call: Call) -> int | None:
    text = call.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 12:
        raise malformed(f"Inference-Header-Content-Length: {text[:32]!r} is not a length")
    return int(text)


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine

    def route(path: str, handler: Handler, summary: str, method: str = "GET", access: Access = Access.TENANTS) -> None:
        app.add_api_route(
            path,
            http.endpoint("infer" if method == "POST" else "v2", handler, v2=True, access=access),
            methods=[method],
            tags=["open inference protocol"],
            summary=summary,
            responses=WORK_ERRORS if method == "POST" else error_responses(Kind.UNAUTHENTICATED, Kind.NOT_FOUND),
        )

    async def server(_: Call) -> Response:
        return json_response(metadata.server_metadata())

    async def live(_: Call) -> Response:
        return json_response({"live": True})

    async def ready(_: Call) -> Response:
        if not engine.ready:
            raise FarsightError(Kind.UNAVAILABLE, f"not ready: {engine.not_ready}")
        return json_response({"ready": True})

    async def model(call: Call) -> Response:
        name, version = call.path_params["name"], call.path_params.get("version", "")
        return json_response(metadata.model_metadata(name, version, engine.model_infos()))

    async def model_ready(call: Call) -> Response:
        name = call.path_params["name"]
        metadata.find_model(name, call.path_params.get("version", ""), engine.model_infos())
        if not engine.alive:
            raise FarsightError(Kind.UNAVAILABLE, f"not ready: {engine.not_ready}")
        return json_response({"name": name, "ready": True})

    async def infer(call: Call) -> Response:
        def parse() -> tuple[oip.Infer, Request]:
            neutral = oip_http.parse_http(
                call.body,
                header_length(call),
                model=call.path_params["name"],
                model_version=call.path_params.get("version", ""),
                max_json_bytes=engine.config.max_json_bytes,
            )
            infos = engine.model_infos()
            return neutral, oip.parse_infer(
                neutral, infos, request_id=call.id, timeout_s=call.timeout_s, tenant=call.tenant.name
            )

        neutral, request = await engine.off_loop(parse) if len(call.body) > INLINE_BYTES else parse()
        if call.is_dry_run:
            return json_response(estimate_document(await engine.priced(request), engine.hour_usd))
        answer = await engine.submit(request, call.received_s)
        if sum(tensor.nbytes for tensor in answer.tensors.values()) > INLINE_BYTES:
            body, length = await engine.off_loop(oip_http.render_http, answer, request, neutral)
        else:
            body, length = oip_http.render_http(answer, request, neutral)
        extra = headers(answer) if length is None else {**headers(answer), HEADER_LENGTH: str(length)}
        return Answered(body, extra, JSON if length is None else BINARY)

    route("/v2", server, "Server metadata")
    route("/v2/health/live", live, "The process answers", access=Access.EVERYBODY)
    route("/v2/health/ready", ready, "Models are loaded and the device answers", access=Access.EVERYBODY)
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        route(prefix, model, "Inputs and outputs of a model")
        route(f"{prefix}/ready", model_ready, "The model answers")
        route(f"{prefix}/infer", infer, "Inference with JSON or binary tensors", method="POST")
