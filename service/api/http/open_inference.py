"""The Open Inference Protocol over HTTP: routes only; `api/open_inference` knows the protocol."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.responses import Response

from service.api.answer import headers
from service.api.handler import Exchange, Parsed
from service.api.http.endpoint import Access, Endpoint, HttpCall, HttpRoutes
from service.api.http.responses import JSON, WORK_KINDS, PartsResponse, error_responses, json_response
from service.api.open_inference.http_body import parse_http, render_http
from service.api.open_inference.metadata import find_model, model_metadata, server_metadata
from service.api.open_inference.protocol import InferRequest, parse_infer
from service.api.service import InferenceService
from service.core.answer import Answer
from service.errors import FarsightError, Kind, malformed

HEADER_LENGTH = "inference-header-content-length"
BINARY = "application/octet-stream"


class OpenInference:
    """The endpoints of the protocol."""

    def __init__(self, routes: HttpRoutes) -> None:
        self._routes, self._service = routes, routes.service

    async def server(self, _: HttpCall) -> Response:
        return json_response(server_metadata())

    async def live(self, _: HttpCall) -> Response:
        return json_response({"live": True})

    async def ready(self, _: HttpCall) -> Response:
        if not self._service.ready:
            raise FarsightError(Kind.UNAVAILABLE, f"not ready: {self._service.not_ready}")
        return json_response({"ready": True})

    async def model(self, call: HttpCall) -> Response:
        name, version = call.path_params["name"], call.path_params.get("version", "")
        return json_response(model_metadata(name, version, self._service.model_infos()))

    async def model_ready(self, call: HttpCall) -> Response:
        name = call.path_params["name"]
        find_model(name, call.path_params.get("version", ""), self._service.model_infos())
        if not self._service.alive:
            raise FarsightError(Kind.UNAVAILABLE, f"not ready: {self._service.not_ready}")
        return json_response({"name": name, "ready": True})

    async def infer(self, call: HttpCall) -> Response:
        exchange = Exchange(
            partial(_parse, call, self._service),
            len(call.body),
            _render,
            lambda price, _: self._routes.price_response(price),
            is_json=_header_length(call) is None,
        )
        return await self._routes.handler.answer(call, exchange)


def _parse(call: HttpCall, service: InferenceService) -> Parsed[InferRequest]:
    infer = parse_http(
        call.body,
        _header_length(call),
        model=call.path_params["name"],
        model_version=call.path_params.get("version", ""),
        max_json_bytes=service.config.max_json_bytes,
    )
    request = parse_infer(
        infer, service.model_infos(), request_id=call.id, timeout_s=call.timeout_s, tenant=call.tenant.name
    )
    return Parsed(request, infer)


def _render(answer: Answer, parsed: Parsed[InferRequest]) -> Response:
    body, length = render_http(answer, parsed.request, parsed.form)
    extra = headers(answer) if length is None else {**headers(answer), HEADER_LENGTH: str(length)}
    return PartsResponse(body, extra, JSON if length is None else BINARY)


def _header_length(call: HttpCall) -> int | None:
    """Bytes of the JSON part of the body; None: all of it. Raises FarsightError (400)."""
    text = call.metadata.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 12:
        raise malformed(f"Inference-Header-Content-Length: expected a length in bytes, got {text[:32]!r}")
    return int(text)


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    endpoints = OpenInference(routes)

    def responses(is_infer: bool) -> dict[int | str, dict[str, object]]:
        kinds = WORK_KINDS if is_infer else (Kind.UNAUTHENTICATED, Kind.NOT_FOUND, Kind.UNAVAILABLE)
        errors = error_responses(*kinds, v2=True)
        return errors | ({200: {"content": {JSON: {}, BINARY: {}}}} if is_infer else {})

    def add(path: str, endpoint: Endpoint, summary: str, access: Access = Access.TENANTS) -> None:
        is_infer = path.endswith("/infer")
        app.add_api_route(
            path,
            routes.route("infer" if is_infer else "v2", endpoint, v2=True, access=access),
            methods=["POST" if is_infer else "GET"],
            tags=["open inference protocol"],
            summary=summary,
            responses=responses(is_infer),
        )

    add("/v2", endpoints.server, "Server metadata")
    add("/v2/health/live", endpoints.live, "The process answers", Access.EVERYBODY)
    add("/v2/health/ready", endpoints.ready, "Models are loaded and the device answers", Access.EVERYBODY)
    # the longest first: names may contain a slash
    for prefix in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
        add(f"{prefix}/ready", endpoints.model_ready, "The model answers")
        add(f"{prefix}/infer", endpoints.infer, "Inference with JSON or binary tensors")
        add(prefix, endpoints.model, "Inputs and outputs of a model")
