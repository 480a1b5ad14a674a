"""Text by the OpenAI conventions: `POST /v1/embeddings`, `GET /v1/models`."""

from __future__ import annotations

import base64
import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from service.api import codec
from service.api.answer import document, headers
from service.api.door import INLINE_BYTES
from service.api.http import JSON, WORK_ERRORS, Answered, Call, Http, error_responses, json_response
from service.api.schema import EmbeddingsBody, TextsOrIds, validated
from service.core import Answer, ForwardRequest, ModelInfo
from service.errors import FarsightError, Kind, invalid


def texts_or_ids(given: TextsOrIds) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """OpenAI's four forms of `input`: a text, texts, token ids, lists of token ids."""
    if isinstance(given, str):
        return (given,), ()
    texts = tuple(one for one in given if isinstance(one, str))
    if texts:
        return texts, ()
    flat = tuple(one for one in given if isinstance(one, int))
    if flat:
        return (), (flat,)
    return (), tuple(tuple(one) for one in given if isinstance(one, list))


def build_embeddings(call: Call, values: dict[str, Any]) -> ForwardRequest:
    if call.timeout_s is not None:
        values = {"timeout_s": call.timeout_s, **values}
    body = validated(EmbeddingsBody, values)
    if not body.input:
        raise invalid("input: expected at least one text or list of token ids", param="input")
    texts, token_ids = texts_or_ids(body.input)
    return ForwardRequest(
        id=call.id,
        model=body.model,
        task="embed",
        texts=texts,
        token_ids=token_ids,
        truncate=body.truncate,
        dimensions=body.dimensions,
        priority=body.priority,
        timeout_s=body.timeout_s,
    )


def embeddings_body(answer: Answer, *, as_base64: bool) -> bytes:
    """OpenAI's list, with our plan, error, cost and timing beside it; `usage` counts the tokens computed."""
    rows = answer.tensors["embedding"]
    vectors = [base64.b64encode(codec.raw_bytes(row)).decode() for row in rows] if as_base64 else list(rows.numpy())
    ours = document(answer)
    usage = {"prompt_tokens": answer.usage.tokens, "total_tokens": answer.usage.tokens, **ours.pop("usage")}
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return codec.dump_json({"object": "list", "data": data, "model": answer.model, "usage": usage, **ours})


def model_document(info: ModelInfo, created: int) -> dict[str, Any]:
    return {"object": "model", "created": created, "owned_by": "farsight", "id": info.name, **asdict(info)}


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine
    created = int(time.time())

    async def embeddings(call: Call) -> Response:
        def parse() -> tuple[ForwardRequest, bool]:
            values = call.json(engine.config.max_json_bytes)
            return build_embeddings(call, values), values.get("encoding_format") == "base64"

        request, as_base64 = await engine.off_loop(parse) if len(call.body) > INLINE_BYTES else parse()
        answer = await engine.submit(request, call.received_s)
        size = answer.tensors["embedding"].nbytes
        if size > INLINE_BYTES:
            body = await engine.off_loop(lambda: embeddings_body(answer, as_base64=as_base64))
        else:
            body = embeddings_body(answer, as_base64=as_base64)
        return Answered(body, headers(answer), JSON)

    @app.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The transformers that are loaded, with their lengths and sizes."""
        data = [model_document(info, created) for info in engine.model_infos()]
        return json_response({"object": "list", "data": data})

    async def model(call: Call) -> Response:
        name = call.path_params["name"]
        for info in engine.model_infos():
            if info.name == name:
                return json_response(model_document(info, created))
        raise FarsightError(Kind.NOT_FOUND, f"model {name[:96]!r} is not served", code="model_not_found", param="model")

    app.add_api_route(
        "/v1/models/{name}",
        http.endpoint("models", model),
        methods=["GET"],
        tags=["models"],
        summary="One model",
        responses=error_responses(Kind.NOT_FOUND),
    )
    http.direct["POST", "/v1/embeddings"] = http.endpoint("embeddings", embeddings)
    app.add_api_route(
        "/v1/embeddings",
        http.direct["POST", "/v1/embeddings"],
        methods=["POST"],
        tags=["text"],
        summary="Embeddings, as the openai client asks for them",
        responses=WORK_ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": {JSON: http.body(EmbeddingsBody)}}},
    )
