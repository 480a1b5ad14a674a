"""`POST /v1/attention` and `POST /v1/estimate`: parse, call, format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI
from starlette.responses import Response

from service.api import codec, safetensors_io
from service.api.answer import document, estimate_document, headers
from service.api.http import text
from service.api.http.endpoint import Call, Http
from service.api.http.estimate import shape_of
from service.api.http.responses import (
    JSON,
    WORK_ERRORS,
    Answered,
    json_response,
)
from service.api.schema import AttentionBody, EstimateBody, validated
from service.api.service import INLINE_BYTES
from service.attention.validate import check_attention
from service.config import Config
from service.core.answer import Answer
from service.core.options import AttentionOptions
from service.core.request import AttentionRequest
from service.errors import invalid

SAFETENSORS = "application/x-safetensors"


def parse_attention(call: Call, config: Config) -> tuple[AttentionRequest, bool]:
    """The request, and whether its tensors came base64-encoded (the answer's will too)."""
    if call.content_type == SAFETENSORS:
        tensors, options = safetensors_io.tensors_from_safetensors(call.body)
        tensors, unknown = codec.split_tensors(tensors)
        if unknown:
            name = next(iter(unknown))
            raise invalid(f"{name}: not a tensor of this endpoint ({', '.join(codec.ATTENTION_TENSORS)})", param=name)
        return build_attention(call, tensors, options), True
    return attention_from_json(call, call.json(config.max_json_bytes))


def attention_from_json(call: Call, values: dict[str, Any]) -> tuple[AttentionRequest, bool]:
    given, options = codec.split_tensors(values)
    encoded = isinstance(given["query"], dict)
    lists = not any(isinstance(value, dict) for value in given.values())
    tensors = {name: codec.tensor_from_json(name, value) for name, value in given.items()}
    return build_attention(call, tensors, options, known_finite=lists), encoded


def build_attention(
    call: Call, tensors: dict[str, torch.Tensor], given: dict[str, Any], *, known_finite: bool = False
) -> AttentionRequest:
    if call.timeout_s is not None:
        given = {"timeout_s": call.timeout_s, **given}
    options = validated(AttentionOptions, given)
    mask, rank = tensors.get("attn_mask"), tensors["query"].dim()
    if mask is not None and rank == mask.dim() == 3:
        mask = mask[None]  # the batch axis was left out of all four
    query, key, value = check_attention(
        tensors["query"], tensors["key"], tensors["value"], mask, options, known_finite=known_finite
    )
    return AttentionRequest(call.id, query, key, value, options, mask, rank, call.tenant.name)


def answer_body(
    answer: Answer, request: AttentionRequest, accept: str, *, encoded: bool
) -> tuple[bytes | Sequence[memoryview], str]:
    """The answer's tensors in the caller's rank and form, with plan, error, usage, cost and timing."""
    squeeze = request.rank == 3
    if SAFETENSORS in accept:
        tensors = {name: tensor[0] if squeeze else tensor for name, tensor in answer.tensors.items()}
        return safetensors_io.dump_safetensors(tensors, document(answer)), SAFETENSORS
    named: dict[str, Any] = {
        name: codec.tensor_to_json(tensor, encoded=encoded, squeeze=squeeze) for name, tensor in answer.tensors.items()
    }
    if "top_weights" in named:
        named["top_weights"] = {"indices": named.pop("top_indices"), "weights": named["top_weights"]}
    return codec.dump_json({**named, **document(answer)}), JSON


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine
    config = engine.config

    async def attention(call: Call) -> Response:
        """Scaled dot-product attention of the caller's own tensors."""
        large = len(call.body) > INLINE_BYTES
        request, encoded = (
            await engine.off_loop(parse_attention, call, config) if large else parse_attention(call, config)
        )
        if call.is_dry_run:
            return json_response(estimate_document(await engine.priced(request), engine.hour_usd))
        answer = await engine.submit(request, call.received_s)
        accept = call.headers.get("accept", "")
        size = sum(tensor.nbytes for tensor in answer.tensors.values())
        if size > INLINE_BYTES:
            body, media = await engine.off_loop(lambda: answer_body(answer, request, accept, encoded=encoded))
        else:
            body, media = answer_body(answer, request, accept, encoded=encoded)
        return Answered(body, headers(answer), media)

    async def estimate(call: Call) -> Response:
        """What a request would cost under each plan. Nothing runs."""

        def parse() -> EstimateBody:
            return validated(EstimateBody, call.json(config.max_json_bytes))

        body = await engine.off_loop(parse) if len(call.body) > INLINE_BYTES else parse()
        if (body.attention is None) == (body.request is None) or (body.request is None) != (body.endpoint is None):
            raise invalid("give either `attention`, or `endpoint` with `request`")
        if body.attention is not None:
            result = engine.estimate(*shape_of(body.attention), call.tenant.name)
        elif body.endpoint == "/v1/attention":
            request, _ = await engine.off_loop(attention_from_json, call, body.request)
            result = await engine.priced(request)
        else:
            assert body.request is not None, "bug: an estimate without a request"
            forward = await engine.off_loop(text.ROUTES[body.endpoint or ""].build, call, body.request)
            result = await engine.priced(forward)
        return json_response(estimate_document(result, engine.hour_usd))

    attention_content = {
        JSON: http.body(AttentionBody),
        SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
    }
    http.direct["POST", "/v1/attention"] = http.endpoint("attention", attention)
    app.add_api_route(
        "/v1/attention",
        http.direct["POST", "/v1/attention"],
        methods=["POST"],
        tags=["attention"],
        summary="Attention over the caller's own tensors",
        responses=WORK_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": attention_content}},
    )
    app.add_api_route(
        "/v1/estimate",
        http.endpoint("estimate", estimate),
        methods=["POST"],
        tags=["cost"],
        summary="Price a request without running it",
        responses=WORK_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": {JSON: http.body(EstimateBody)}}},
    )
