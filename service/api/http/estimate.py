"""`POST /v1/estimate`: what a request would cost under each plan. Nothing runs."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.responses import Response

from service.api.handler import Handler
from service.api.http import attention, text
from service.api.http.endpoint import HttpCall, HttpRoutes
from service.api.http.responses import JSON, WORK_ERRORS
from service.api.schema import EstimateBody, ShapeBody, validated
from service.core.host_work import HostKind
from service.core.options import AttentionOptions
from service.core.request import AttentionShape
from service.engine.pricing import Estimate
from service.errors import invalid


def shape_of(body: ShapeBody) -> tuple[AttentionShape, AttentionOptions]:
    """The sizes and options of an estimate without tensors. Raises FarsightError (422)."""
    kv_heads = body.kv_heads or body.heads
    if body.heads % kv_heads:
        raise invalid(f"heads: expected a multiple of kv_heads {kv_heads}, got {body.heads}", param="heads")
    shape = AttentionShape(
        batch=body.batch,
        heads=body.heads,
        kv_heads=kv_heads,
        query_length=body.query_length,
        key_length=body.key_length or body.query_length,
        head_dim=body.head_dim,
        value_dim=body.value_dim or body.head_dim,
        dtype=body.dtype,
    )
    options = body.model_dump(include={"is_causal", "window", "mode", "max_error"})
    return shape, validated(AttentionOptions, options)


async def estimated(handler: Handler, call: HttpCall) -> Estimate:
    """The price of what the body describes: sizes, or a real request with its endpoint. Raises FarsightError."""

    service, size, call.record.is_dry_run = handler.service, len(call.body), True

    def parse() -> EstimateBody:
        return validated(EstimateBody, call.json(service.config.max_json_bytes))

    body = await handler.parsed(call, size, parse)
    if (body.attention is None) == (body.request is None) or (body.request is None) != (body.endpoint is None):
        raise invalid("expected either `attention`, or `endpoint` with `request`")
    if body.attention is not None:
        return service.estimate(*shape_of(body.attention), call.tenant.name)
    assert body.request is not None, "bug: an estimate without a request"
    if body.endpoint == attention.PATH:
        read = partial(attention.attention_from_json, call, body.request)
        request, _ = await handler.parsed(call, size, read, HostKind.PARSE)
        return await service.priced(request, call.record)
    endpoint = text.ENDPOINTS[body.endpoint or ""]
    read_text = partial(text.forward_request, call, body.request, endpoint)
    forward = await handler.parsed(call, size, read_text, HostKind.PARSE)
    return await service.priced(forward.request, call.record)


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    async def estimate(call: HttpCall) -> Response:
        return routes.price_response(await estimated(routes.handler, call))

    app.add_api_route(
        "/v1/estimate",
        routes.route("estimate", estimate),
        methods=["POST"],
        tags=["cost"],
        summary="Price a request without running it",
        responses=WORK_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": {JSON: routes.body_schema(EstimateBody)}}},
    )
