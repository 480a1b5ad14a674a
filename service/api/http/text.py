"""What transformers are asked for over HTTP: embeddings, classes, ranks, scores, explanations."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from service.api import codec
from service.api.answer import document, estimate_document, headers
from service.api.http.endpoint import Call, Http
from service.api.http.responses import (
    JSON,
    WORK_ERRORS,
    Answered,
    json_response,
)
from service.api.schema import (
    ClassifyBody,
    Document,
    EmbeddingsBody,
    ExplainBody,
    RerankBody,
    ScoreBody,
    TextsOrIds,
    validated,
)
from service.api.service import INLINE_BYTES
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

Options = TypeVar("Options", bound=ForwardOptions)


@dataclass(frozen=True, slots=True)
class TextEndpoint:
    """One endpoint: how its body becomes a request, and how an answer becomes a body."""

    task: Task
    summary: str
    body: type[BaseModel]
    build: Callable[[Call, dict[str, Any]], ForwardRequest]
    render: Callable[[Answer, dict[str, Any]], bytes]


# -- bodies to requests -----------------------------------------------------------------------------------------


def texts_or_ids(given: TextsOrIds | None) -> dict[str, Any]:
    """OpenAI's four forms of `input`: a text, texts, token ids, lists of token ids."""
    if given is None or given == []:
        raise invalid("input: expected at least one text or list of token ids", param="input")
    if isinstance(given, str):
        return {"texts": (given,)}
    texts = tuple(one for one in given if isinstance(one, str))
    if texts:
        return {"texts": texts}
    flat = tuple(one for one in given if isinstance(one, int))
    if flat:
        return {"token_ids": (flat,)}
    return {"token_ids": tuple(tuple(one) for one in given if isinstance(one, list))}


def image_bytes(given: list[str]) -> tuple[bytes, ...]:
    """Base64, or data URLs of it."""
    found = []
    for index, text in enumerate(given):
        if text.startswith("data:"):
            head, comma, text = text.partition(",")
            if not comma or not head.endswith(";base64"):
                raise invalid(f"image {index}: a data URL must end its head in ;base64", param="images")
        try:
            found.append(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise invalid(f"image {index} is not base64; URLs are not fetched", param="images") from error
    if not found:
        raise invalid("images: expected at least one", param="images")
    return tuple(found)


def _parsed(call: Call, values: dict[str, Any], body: type[BaseModel]) -> Any:
    if call.timeout_s is not None:
        values = {"timeout_s": call.timeout_s, **values}
    return validated(body, values)


def _options(body: BaseModel, options: type[Options]) -> Options:
    return options(**{name: getattr(body, name) for name in options.model_fields})


def _inputs(body: EmbeddingsBody | ClassifyBody) -> dict[str, Any]:
    if (body.input is None) == (body.images is None):
        raise invalid("give exactly one of input and images", param="input")
    return texts_or_ids(body.input) if body.images is None else {"images": image_bytes(body.images)}


def _request(call: Call, model: str, task: Task, options: ForwardOptions, **inputs: Any) -> ForwardRequest:
    return ForwardRequest(call.id, model, task, options, tenant=call.tenant.name, **inputs)


def build_embeddings(call: Call, values: dict[str, Any]) -> ForwardRequest:
    body = _parsed(call, values, EmbeddingsBody)
    return _request(call, body.model, "embed", _options(body, EmbedOptions), **_inputs(body))


def build_classify(call: Call, values: dict[str, Any]) -> ForwardRequest:
    body = _parsed(call, values, ClassifyBody)
    return _request(call, body.model, "classify", _options(body, ClassifyOptions), **_inputs(body))


def build_rerank(call: Call, values: dict[str, Any]) -> ForwardRequest:
    body = _parsed(call, values, RerankBody)
    pairs = tuple((body.query, text) for text in _documents(body.documents))
    return _request(call, body.model, "rerank", _options(body, ClassifyOptions), pairs=pairs)


def build_score(call: Call, values: dict[str, Any]) -> ForwardRequest:
    body = _parsed(call, values, ScoreBody)
    options = _options(body, ScoreOptions)
    if body.source is None and body.target is None:
        return _request(call, body.model, "score", options, **texts_or_ids(body.input))
    if body.source is None or body.target is None or body.input is not None:
        raise invalid("give either input, or source and target", param="source")
    source, target = ([one] if isinstance(one, str) else one for one in (body.source, body.target))
    if len(source) != len(target) or not source:
        raise invalid(f"source and target: expected equally many, got {len(source)} and {len(target)}", param="target")
    return _request(call, body.model, "score", options, pairs=tuple(zip(source, target, strict=True)))


def build_explain(call: Call, values: dict[str, Any]) -> ForwardRequest:
    body = _parsed(call, values, ExplainBody)
    options = _options(body, ExplainOptions)
    return _request(call, body.model, "explain", options, texts=(body.text,), query=body.query)


def _documents(given: list[str | Document]) -> list[str]:
    return [one if isinstance(one, str) else one.text for one in given]


# -- answers to bodies ------------------------------------------------------------------------------------------


def _whole(answer: Answer, name: str, data: Any) -> bytes:
    """OpenAI's list where it fits, with our plan, error, cost and timing beside it."""
    ours = document(answer)
    usage = {"prompt_tokens": answer.usage.tokens, "total_tokens": answer.usage.tokens, **ours.pop("usage")}
    return codec.dump_json({"object": "list", name: data, "model": answer.model, "usage": usage, **ours})


def render_embeddings(answer: Answer, values: dict[str, Any]) -> bytes:
    rows = answer.tensors["embedding"]
    as_base64 = values.get("encoding_format") == "base64"
    vectors = [base64.b64encode(codec.raw_bytes(row)).decode() for row in rows] if as_base64 else list(rows.numpy())
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return _whole(answer, "data", data)


def render_classify(answer: Answer, _: dict[str, Any]) -> bytes:
    labels = answer.details
    data = []
    for index, row in enumerate(answer.tensors["scores"]):
        best = row.argsort(descending=True).tolist()
        named = [{"label": labels[at], "score": row[at].item()} for at in best]
        data.append({"index": index, "label": named[0]["label"], "score": named[0]["score"], "scores": named})
    return _whole(answer, "data", data)


def render_rerank(answer: Answer, values: dict[str, Any]) -> bytes:
    scores = answer.tensors["scores"][:, 0]
    best = torch.argsort(scores, descending=True, stable=True).tolist()[: values.get("top_n")]
    results = [{"index": at, "relevance_score": scores[at].item()} for at in best]
    if values.get("return_documents"):
        texts = [one if isinstance(one, str) else one["text"] for one in values["documents"]]
        results = [{**one, "document": {"text": texts[int(one["index"])]}} for one in results]
    return _whole(answer, "results", results)


def render_score(answer: Answer, _: dict[str, Any]) -> bytes:
    return _whole(answer, "data", [{"index": index, **one} for index, one in enumerate(answer.details)])


def render_explain(answer: Answer, _: dict[str, Any]) -> bytes:
    return codec.dump_json({"model": answer.model, "explanation": answer.details, **document(answer)})


ROUTES = {
    "/v1/embeddings": TextEndpoint(
        "embed", "Embeddings, as the openai client asks for them", EmbeddingsBody, build_embeddings, render_embeddings
    ),
    "/v1/classify": TextEndpoint(
        "classify", "Labels of texts or images", ClassifyBody, build_classify, render_classify
    ),
    "/v1/rerank": TextEndpoint("rerank", "Documents by relevance to a query", RerankBody, build_rerank, render_rerank),
    "/v1/score": TextEndpoint(
        "score", "Log-probabilities and perplexity of given text", ScoreBody, build_score, render_score
    ),
    "/v1/explain": TextEndpoint(
        "explain", "Which tokens a token attends to, by layer and head", ExplainBody, build_explain, render_explain
    ),
}


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine

    async def answered(route: TextEndpoint, call: Call) -> Response:
        def parse() -> tuple[ForwardRequest, dict[str, Any]]:
            values = call.json(engine.config.max_json_bytes)
            return route.build(call, values), values

        request, values = await engine.off_loop(parse) if len(call.body) > INLINE_BYTES else parse()
        if call.is_dry_run:
            return json_response(estimate_document(await engine.priced(request), engine.hour_usd))
        answer = await engine.submit(request, call.received_s)
        size = sum(tensor.nbytes for tensor in answer.tensors.values())
        if size > INLINE_BYTES or route.task in ("score", "explain"):  # whose details may be long
            body = await engine.off_loop(route.render, answer, values)
        else:
            body = route.render(answer, values)
        return Answered(body, headers(answer), JSON)

    for path, route in ROUTES.items():
        http.direct["POST", path] = http.endpoint(path.rpartition("/")[2], partial(answered, route))
        app.add_api_route(
            path,
            http.direct["POST", path],
            methods=["POST"],
            tags=["text"],
            summary=route.summary,
            responses=WORK_ERRORS,
            openapi_extra={"requestBody": {"required": True, "content": {JSON: http.body(route.body)}}},
        )
