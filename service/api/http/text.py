"""Tasks of transformers over HTTP: embeddings, classes, ranks, scores, explanations."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from service.api import codec
from service.api.answer import document, headers
from service.api.handler import INLINE_BYTES, Exchange, Parsed
from service.api.http.endpoint import HttpCall, HttpRoutes
from service.api.http.multipart import MULTIPART, form_schema
from service.api.http.responses import JSON, WORK_ERRORS, PartsResponse
from service.api.schema import (
    ClassifyBody,
    EmbeddingsBody,
    ExplainBody,
    RerankBody,
    ScoreBody,
    TextsOrIds,
    options_of,
    validated,
)
from service.core.answer import Answer
from service.core.options import (
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    ForwardOptions,
    ScoreOptions,
    Task,
)
from service.core.request import ForwardRequest
from service.errors import invalid

FILES = ("images", "audio")  # fields whose values are files


@dataclass(frozen=True, slots=True)
class TextEndpoint:
    """One endpoint: how its body becomes a request, and how an answer becomes a body."""

    task: Task
    summary: str
    name: str  # as metrics, ledger and log line show it
    body: type[BaseModel]
    inputs: Callable[[Any], dict[str, Any]]  # of a validated body, as `ForwardRequest` names them
    options: type[ForwardOptions]
    render: Callable[[Answer, Any], bytes]  # with the validated body


# -- bodies to requests -----------------------------------------------------------------------------------------


def takes_files(body: type[BaseModel]) -> bool:
    """Whether a body may be a form with files."""
    return any(name in body.model_fields for name in FILES)


def texts_or_ids(given: TextsOrIds | None) -> dict[str, Any]:
    """OpenAI's four forms of `input`: a text, texts, token ids, lists of token ids."""
    if given is None or given == []:
        raise invalid("input: expected at least one text or list of token ids", param="input")
    if isinstance(given, str):
        return {"texts": (given,)}
    texts = tuple(text for text in given if isinstance(text, str))
    if texts:
        return {"texts": texts}
    flat = tuple(number for number in given if isinstance(number, int))
    if flat:
        return {"token_ids": (flat,)}
    return {"token_ids": tuple(tuple(ids) for ids in given if isinstance(ids, list))}


def file_bytes(given: list[str | bytes], name: Literal["images", "audio"]) -> tuple[bytes, ...]:
    """Base64 or data URLs of it, or files of a form as they are."""
    found, noun = [], name.removesuffix("s")
    for index, entry in enumerate(given):
        if isinstance(entry, bytes):
            found.append(entry)
            continue
        if entry[:5].lower() == "data:":
            head, comma, entry = entry.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise invalid(f"{noun} {index}: expected a data URL with ;base64", param=name)
        try:
            found.append(base64.b64decode(entry, validate=True))
        except ValueError as error:  # binascii.Error, or characters beyond ASCII
            message = f"{noun} {index}: expected base64 (URLs are not fetched), or in a form a file: {name}=@FILE"
            raise invalid(message, param=name) from error
    if not found:
        raise invalid(f"{name}: expected at least one", param=name)
    return tuple(found)


def embedded_inputs(body: EmbeddingsBody) -> dict[str, Any]:
    """Texts, ids, images or audio."""
    if body.audio is None:
        return classified_inputs(body)
    if body.input is not None or body.images is not None:
        raise invalid("expected exactly one of input, images and audio", param="audio")
    return {"audio": file_bytes(body.audio, "audio")}


def classified_inputs(body: EmbeddingsBody | ClassifyBody) -> dict[str, Any]:
    """Texts, ids or images."""
    if (body.input is None) == (body.images is None):
        others = "input, images and audio" if isinstance(body, EmbeddingsBody) else "input and images"
        raise invalid(f"expected exactly one of {others}", param="input")
    return texts_or_ids(body.input) if body.images is None else {"images": file_bytes(body.images, "images")}


def pairs_of(body: RerankBody) -> dict[str, Any]:
    """The query with each document."""
    documents = [entry if isinstance(entry, str) else entry.text for entry in body.documents]
    return {"pairs": tuple((body.query, text) for text in documents)}


def scored_inputs(body: ScoreBody) -> dict[str, Any]:
    """What is scored: texts or ids of a decoder, or targets given their sources."""
    if body.source is None and body.target is None:
        return texts_or_ids(body.input)
    if body.source is None or body.target is None or body.input is not None:
        raise invalid("expected either input, or source and target", param="source")
    source, target = ([side] if isinstance(side, str) else side for side in (body.source, body.target))
    if len(source) != len(target) or not source:
        raise invalid(
            f"source and target: expected the same number, got {len(source)} and {len(target)}", param="target"
        )
    return {"pairs": tuple(zip(source, target, strict=True))}


def explained_inputs(body: ExplainBody) -> dict[str, Any]:
    """The text, and the token in it that is explained."""
    return {"texts": (body.text,), "query": body.query}


def forward_request(call: HttpCall, values: dict[str, Any], endpoint: TextEndpoint) -> Parsed[Any]:
    """The request of a body, and the body as validated. Raises FarsightError (422)."""
    if call.timeout_s is not None:
        values = {"timeout_s": call.timeout_s, **values}
    body: Any = validated(endpoint.body, values)
    request = ForwardRequest(
        id=call.id,
        model=body.model,
        task=endpoint.task,
        options=options_of(body, endpoint.options),
        tenant=call.tenant.name,
        endpoint=call.endpoint,
        **endpoint.inputs(body),
    )
    return Parsed(request, body)


# -- answers to bodies ------------------------------------------------------------------------------------------


def _whole(answer: Answer, name: str, data: Any) -> bytes:
    """OpenAI's list object with our plan, accuracy, cost and timing added."""
    ours = document(answer)
    usage = {"prompt_tokens": answer.usage.tokens, "total_tokens": answer.usage.tokens, **ours.pop("usage")}
    return codec.dump_json({"object": "list", name: data, "model": answer.model, "usage": usage, **ours})


def render_embeddings(answer: Answer, body: EmbeddingsBody) -> bytes:
    rows = answer.tensors["embedding"]
    as_base64 = body.encoding_format == "base64"
    vectors = [base64.b64encode(codec.raw_bytes(row)).decode() for row in rows] if as_base64 else list(rows.numpy())
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return _whole(answer, "data", data)


def render_classify(answer: Answer, _: ClassifyBody) -> bytes:
    labels = answer.details
    data = []
    for index, row in enumerate(answer.tensors["scores"]):
        best = row.argsort(descending=True).tolist()
        named = [{"label": labels[at], "score": row[at].item()} for at in best]
        data.append({"index": index, "label": named[0]["label"], "score": named[0]["score"], "scores": named})
    return _whole(answer, "data", data)


def render_rerank(answer: Answer, body: RerankBody) -> bytes:
    scores = answer.tensors["scores"][:, 0]
    best = torch.argsort(scores, descending=True, stable=True).tolist()[: body.top_n]
    results = [{"index": at, "relevance_score": scores[at].item()} for at in best]
    if body.return_documents:
        texts = [entry if isinstance(entry, str) else entry.text for entry in body.documents]
        results = [{**result, "document": {"text": texts[int(result["index"])]}} for result in results]
    return _whole(answer, "results", results)


def render_score(answer: Answer, _: ScoreBody) -> bytes:
    return _whole(answer, "data", [{"index": index, **scored} for index, scored in enumerate(answer.details)])


def render_explain(answer: Answer, _: ExplainBody) -> bytes:
    return codec.dump_json({"model": answer.model, "explanation": answer.details, **document(answer)})


ENDPOINTS = {
    f"/v1/{endpoint.name}": endpoint
    for endpoint in (
        TextEndpoint(
            task="embed",
            summary="Embeddings, as the openai client asks for them",
            name="embeddings",
            body=EmbeddingsBody,
            inputs=embedded_inputs,
            options=EmbedOptions,
            render=render_embeddings,
        ),
        TextEndpoint(
            task="classify",
            summary="Labels of texts or images",
            name="classify",
            body=ClassifyBody,
            inputs=classified_inputs,
            options=ClassifyOptions,
            render=render_classify,
        ),
        TextEndpoint(
            task="rerank",
            summary="Documents by relevance to a query",
            name="rerank",
            body=RerankBody,
            inputs=pairs_of,
            options=ClassifyOptions,
            render=render_rerank,
        ),
        TextEndpoint(
            task="score",
            summary="Log-probabilities and perplexity of given text",
            name="score",
            body=ScoreBody,
            inputs=scored_inputs,
            options=ScoreOptions,
            render=render_score,
        ),
        TextEndpoint(
            task="explain",
            summary="Which tokens a token attends to, by layer and head",
            name="explain",
            body=ExplainBody,
            inputs=explained_inputs,
            options=ExplainOptions,
            render=render_explain,
        ),
    )
}


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    config = routes.service.config

    async def answered(endpoint: TextEndpoint, call: HttpCall) -> Response:
        def parse() -> Parsed[Any]:
            values = call.values if takes_files(endpoint.body) else call.json
            return forward_request(call, values(config.max_json_bytes), endpoint)

        def render(answer: Answer, parsed: Parsed[Any]) -> Response:
            return PartsResponse(endpoint.render(answer, parsed.form), headers(answer), JSON)

        is_form = call.content_type == MULTIPART  # read off the loop, however small
        exchange = Exchange(
            parse,
            len(call.body) + is_form * INLINE_BYTES,
            render,
            lambda price, _: routes.price_response(price),
            is_long=endpoint.task in ("score", "explain"),
            is_json=not is_form,
        )
        return await routes.handler.answer(call, exchange)

    for path, endpoint in ENDPOINTS.items():
        contents = {JSON: routes.body_schema(endpoint.body)}
        if takes_files(endpoint.body):
            contents[MULTIPART] = form_schema(endpoint.body.model_fields, FILES)
        routes.direct["POST", path] = routes.route(endpoint.name, partial(answered, endpoint))
        app.add_api_route(
            path,
            routes.direct["POST", path],
            methods=["POST"],
            tags=["text"],
            summary=endpoint.summary,
            responses=WORK_ERRORS,
            openapi_extra={"requestBody": {"required": True, "content": contents}},
        )
