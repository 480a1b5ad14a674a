"""`POST /v1/attention`: attention over the caller's own tensors, as JSON or safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from starlette.responses import Response

from service.api import codec, safetensors_io
from service.api.answer import document, headers
from service.api.handler import Exchange, Parsed
from service.api.http.endpoint import HttpCall, HttpRoutes
from service.api.http.responses import JSON, WORK_ERRORS, PartsResponse
from service.api.schema import AttentionBody, validated
from service.attention.validate import check_attention
from service.config import Config
from service.core.answer import Answer
from service.core.options import AttentionOptions
from service.core.request import AttentionRequest
from service.errors import invalid

PATH, ENDPOINT = "/v1/attention", "attention"
SAFETENSORS = "application/x-safetensors"


@dataclass(frozen=True, slots=True)
class TensorForm:
    """How an answer's tensors are written."""

    is_safetensors: bool
    is_encoded: bool  # in JSON as base64 objects, as the request's were
    squeeze: bool  # without the batch axis, as the request's were


def parse_attention(call: HttpCall, config: Config) -> Parsed[TensorForm]:
    """The request, and the form of its answer. Raises FarsightError."""
    is_safetensors = SAFETENSORS in call.metadata.get("accept", "")
    if call.content_type != SAFETENSORS:
        request, is_encoded = attention_from_json(call, call.json(config.max_json_bytes))
        return Parsed(request, TensorForm(is_safetensors, is_encoded, request.rank == 3))
    tensors, options = safetensors_io.tensors_from_safetensors(call.body)
    tensors, unknown = codec.split_tensors(tensors)
    if unknown:
        name = next(iter(unknown))
        raise invalid(f"{name}: expected one of {', '.join(codec.ATTENTION_TENSORS)}", param=name)
    request = _request(call, tensors, options)
    return Parsed(request, TensorForm(is_safetensors, True, request.rank == 3))


def attention_from_json(call: HttpCall, values: dict[str, Any]) -> tuple[AttentionRequest, bool]:
    """The request of a JSON body, and whether its tensors came base64-encoded. Raises FarsightError."""
    given, options = codec.split_tensors(values)
    is_encoded = isinstance(given["query"], dict)
    are_lists = not any(isinstance(value, dict) for value in given.values())
    tensors = {name: codec.tensor_from_json(name, value) for name, value in given.items()}
    return _request(call, tensors, options, known_finite=are_lists), is_encoded


def _request(
    call: HttpCall, tensors: dict[str, torch.Tensor], given: dict[str, Any], *, known_finite: bool = False
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
    return AttentionRequest(call.id, query, key, value, options, mask, rank, call.tenant.name, ENDPOINT)


def render_attention(answer: Answer, parsed: Parsed[TensorForm]) -> Response:
    """The answer's tensors in the caller's rank and form, with plan, accuracy, usage, cost and timing."""
    body, media = _body(answer, parsed.form)
    return PartsResponse(body, headers(answer), media)


def _body(answer: Answer, form: TensorForm) -> tuple[bytes | Sequence[memoryview], str]:
    if form.is_safetensors:
        tensors = {name: tensor[0] if form.squeeze else tensor for name, tensor in answer.tensors.items()}
        return safetensors_io.dump_safetensors(tensors, document(answer)), SAFETENSORS
    named: dict[str, Any] = {
        name: codec.tensor_to_json(tensor, encoded=form.is_encoded, squeeze=form.squeeze)
        for name, tensor in answer.tensors.items()
    }
    if "top_weights" in named:
        named["top_weights"] = {"indices": named.pop("top_indices"), "weights": named["top_weights"]}
    return codec.dump_json({**named, **document(answer)}), JSON


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    config = routes.service.config

    async def attention(call: HttpCall) -> Response:
        """Scaled dot-product attention of the caller's own tensors."""
        parse = partial(parse_attention, call, config)
        exchange = Exchange(
            parse,
            len(call.body),
            render_attention,
            lambda price, _: routes.price_response(price),
            is_json=call.content_type != SAFETENSORS,
        )
        return await routes.handler.answer(call, exchange)

    content = {
        JSON: routes.body_schema(AttentionBody),
        SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
    }
    routes.direct["POST", PATH] = routes.route(ENDPOINT, attention)
    app.add_api_route(
        PATH,
        routes.direct["POST", PATH],
        methods=["POST"],
        tags=["attention"],
        summary="Attention over the caller's own tensors",
        responses={**WORK_ERRORS, 200: {"content": {JSON: {}, SAFETENSORS: {}}}},
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
