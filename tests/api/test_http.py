"""Every HTTP route against the real engine, in process: answers, headers, and the whole error table."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import torch
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry
from safetensors.torch import load, save

from service.api.http.app import create_app, errors_table
from service.api.http.responses import error_response
from service.attention import reference
from service.attention.masks import MaskSpec
from service.engine.engine import Engine
from service.errors import FarsightError, Kind
from tests.api.common import caller

SMALL = {"query": [[[1.0, 0.0]]], "key": [[[1.0, 0.0], [0.0, 1.0]]], "value": [[[1.0, 2.0], [3.0, 4.0]]]}
HEADERS = {
    "x-request-id", "x-attention-plan", "x-attention-error", "x-queue-seconds", "x-device-seconds",
    "x-compute-tokens", "x-compute-flops", "x-cost-usd",
}  # fmt: skip


@pytest.fixture(scope="module")
def call(engine: Engine) -> Any:
    return caller(create_app(engine))


def message(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    return str(error["message"])


def test_a_certificate_is_answered_only_where_it_is_asked_for(call: Any) -> None:
    """Keys in tight clusters: it is proven that little was left unread."""
    draw = torch.Generator().manual_seed(0)
    centres = 8 * torch.nn.functional.normalize(torch.randn(1, 16, 32, generator=draw), dim=2)
    key = centres.repeat_interleave(128, 1) + 0.02 * torch.randn(1, 2048, 32, generator=draw)
    value = torch.randn(key.shape, generator=draw)
    asked = {"query": (2 * key).tolist(), "key": key.tolist(), "value": value.tolist()}
    asked |= {"mode": "sparse", "max_error": 1e-4}
    found = {}
    for returns in (["output"], ["output", "certificate"], ["certificate"]):
        response = call("POST", "/v1/attention", json=asked | {"returns": returns})
        assert response.status_code == 200
        found[tuple(returns)] = response.json()
        assert response.json()["plan"]["kind"] == "sparse"
        assert ("output" in response.json()) == ("output" in returns)
    assert "certified_unread" not in found[("output",)]["error"]
    assert 0 <= found[("certificate",)]["error"]["certified_unread"] < 0.5
    assert found[("output", "certificate")]["error"] == found[("certificate",)]["error"]
    exact = call("POST", "/v1/attention", json=SMALL | {"returns": ["certificate"]})
    assert exact.status_code == 200
    assert "output" not in exact.json()
    assert "certified_unread" not in exact.json()["error"]


def test_attention_as_json(call: Any) -> None:
    response = call("POST", "/v1/attention", json=SMALL)
    body = response.json()
    assert response.status_code == 200
    assert set(response.headers) >= HEADERS
    assert set(body) == {"output", "id", "plan", "error", "usage", "cost", "timing"}
    weights = torch.softmax(torch.tensor([1.0, 0.0]) / 2**0.5, 0)
    assert torch.allclose(torch.tensor(body["output"]), (weights @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[None, None])
    assert body["id"] == response.headers["x-request-id"]
    assert body["error"] == {"kind": "exact", "fallback": False}
    assert float(response.headers["x-device-seconds"]) == pytest.approx(body["usage"]["device_s"], abs=1e-6)
    assert response.headers["x-compute-flops"] == str(body["usage"]["flops"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_as_safetensors(call: Any, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 4, 40, 16).to(dtype), *torch.randn(2, 2, 2, 40, 16).to(dtype))
    options = json.dumps({"is_causal": True, "returns": ["output", "lse"]})
    body = save({"query": query, "key": key, "value": value}, metadata={"options": options})
    headers = {"content-type": "application/x-safetensors", "accept": "application/x-safetensors"}
    response = call("POST", "/v1/attention", content=body, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-safetensors"
    tensors = load(response.content)
    exact = reference.attend(query.double(), key.double(), value.double(), MaskSpec(is_causal=True))
    assert tensors["output"].dtype is dtype
    assert (tensors["output"] - exact.out).abs().max() < {4: 1e-5, 2: 3e-2}[dtype.itemsize]
    assert (tensors["lse"] - exact.lse).abs().max() < 1e-2
    size = struct.unpack("<Q", response.content[:8])[0]
    answer = orjson.loads(orjson.loads(response.content[8 : 8 + size])["__metadata__"]["answer"])
    assert set(answer) == {"id", "plan", "error", "usage", "cost", "timing"}


def test_base64_in_base64_out(call: Any) -> None:
    tensor = torch.randn(1, 8, 4)
    data = {"dtype": "float32", "shape": [1, 8, 4], "data": base64.b64encode(tensor.numpy().tobytes()).decode()}
    body = call("POST", "/v1/attention", json={"query": data, "key": data, "value": data}).json()
    assert body["output"]["shape"] == [1, 8, 4]
    got = torch.frombuffer(bytearray(base64.b64decode(body["output"]["data"])), dtype=torch.float32).reshape(1, 8, 4)
    exact = reference.attend(tensor[None], tensor[None], tensor[None], MaskSpec())
    assert torch.allclose(got, exact.out[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_each_mode_really_runs(call: Any, mode: str) -> None:
    response = call("POST", "/v1/attention", json={**SMALL, "mode": mode})
    assert response.json()["plan"]["kind"] == response.headers["x-attention-plan"] == mode
    if mode == "sparse":
        assert response.json()["error"]["kind"] == "measured"
        assert response.json()["plan"]["density"] > 0


def test_weights_and_top_weights(call: Any) -> None:
    body = call("POST", "/v1/attention", json={**SMALL, "returns": ["weights", "top_weights"], "top_k": 1}).json()
    assert "output" not in body
    assert sum(body["weights"][0][0]) == pytest.approx(1.0)
    assert body["top_weights"]["indices"] == [[[0]]]
    assert body["top_weights"]["weights"][0][0][0] == pytest.approx(body["weights"][0][0][0])


# one query of ones at the last valid key, three keys scoring 2, 4 and -1, the fourth past kv_lengths
STAGED = {
    "query": [[[1.0, 1.0]]],
    "key": [[[1.0, 1.0], [2.0, 2.0], [-1.0, 0.0], [9.0, 9.0]]],
    "value": [[[1.0], [2.0], [3.0], [4.0]]],
    "attn_mask": [[0.0, -10.0, 0.5, 0.0]],
    "kv_lengths": [3],
    "window": [1, 0],
    "scale": 1.0,
    "softcap": 2.0,
    "returns": ["weights", "top_weights"],
    "top_k": 3,
}
CAPPED = [2 * math.tanh(score / 2) for score in (2.0, 4.0, -1.0)]
MASKED = [CAPPED[1] - 10.0, CAPPED[2] + 0.5]
SHARE = 1 / (1 + math.exp(MASKED[0] - MASKED[1]))
STAGES: list[tuple[str, list[float | None], list[int], list[float | None]]] = [
    ("raw", [2.0, 4.0, -1.0, None], [1, 0, 2], [4.0, 2.0, -1.0]),
    ("capped", [*CAPPED, None], [1, 0, 2], [CAPPED[1], CAPPED[0], CAPPED[2]]),
    ("masked", [None, *MASKED, None], [2, 1, -1], [MASKED[1], MASKED[0], None]),
    ("softmax", [0.0, 1 - SHARE, SHARE, 0.0], [2, 1, -1], [SHARE, 1 - SHARE, 0.0]),
]


def test_a_block_map_in_every_form(call: Any) -> None:
    tensor = torch.randn(1, 2, 300, 4, generator=torch.Generator().manual_seed(0))
    tensors = {name: tensor.clone() for name in ("query", "key", "value")}
    causal = [[255, 0, 0], [255, 255, 0], [255, 255, 255]]
    given = {name: tensor.tolist() for name in tensors}
    body = call("POST", "/v1/attention", json={**given, "is_causal": True, "returns": ["block_map"]}).json()
    assert body["block_map"] == [[causal, causal]]
    assert "output" not in body
    content = save(tensors, metadata={"options": json.dumps({"mode": "sparse", "returns": ["output", "block_map"]})})
    headers = {"content-type": "application/x-safetensors", "accept": "application/x-safetensors"}
    binary = load(call("POST", "/v1/attention", content=content, headers=headers).content)
    assert binary["block_map"].dtype == torch.uint8
    assert binary["block_map"].shape == (1, 2, 3, 3)
    assert binary["block_map"].min() >= 1, "all is visible"
    inputs = [{"name": name, "datatype": "FP32", "shape": [1, 2, 300, 4], "data": given[name]} for name in given]
    asked = {"inputs": inputs, "parameters": {"is_causal": True}, "outputs": [{"name": "block_map"}]}
    (output,) = call("POST", "/v2/models/attention/infer", json=asked).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("UINT8", [1, 2, 3, 3])
    assert output["data"] == [cell for _ in range(2) for row in causal for cell in row]


def with_infinities(numbers: list[float | None]) -> list[float]:
    return [-math.inf if number is None else number for number in numbers]


@pytest.mark.parametrize(("stage", "weights", "indices", "top"), STAGES, ids=[case[0] for case in STAGES])
def test_scores_of_each_stage(
    call: Any, stage: str, weights: list[float | None], indices: list[int], top: list[float | None]
) -> None:
    body = call("POST", "/v1/attention", json={**STAGED, "stage": stage}).json()
    told, best = body["weights"][0][0], body["top_weights"]["weights"][0][0]
    assert [number is None for number in told] == [number is None for number in weights]  # -inf is null in lists
    assert [number is None for number in best] == [number is None for number in top]
    assert with_infinities(told) == pytest.approx(with_infinities(weights), rel=1e-4)
    assert with_infinities(best) == pytest.approx(with_infinities(top), rel=1e-4)
    assert body["top_weights"]["indices"] == [[indices]]

    tensors = {name: torch.tensor(STAGED[name]) for name in ("query", "key", "value", "attn_mask")}
    options = {name: value for name, value in STAGED.items() if name not in tensors}
    content = save(tensors, metadata={"options": json.dumps({**options, "stage": stage})})
    headers = {"content-type": "application/x-safetensors", "accept": "application/x-safetensors"}
    binary = load(call("POST", "/v1/attention", content=content, headers=headers).content)
    assert torch.equal(binary["weights"][0, 0], torch.tensor(with_infinities(told)))  # bytes carry -inf itself
    assert torch.equal(binary["top_weights"][0, 0], torch.tensor(with_infinities(best)))
    assert binary["top_indices"].flatten().tolist() == indices

    inputs = [
        {"name": name, "datatype": "FP32", "shape": list(tensor.shape), "data": tensor.flatten().tolist()}
        for name, tensor in tensors.items()
    ]
    listed = {name: json.dumps(value) if isinstance(value, list) else value for name, value in options.items()}
    document = {"inputs": inputs, "parameters": {**listed, "stage": stage}}
    response = call("POST", "/v2/models/attention/infer", json=document)
    by_name = {output["name"]: output["data"] for output in response.json()["outputs"]}
    assert by_name == {"weights": told, "top_weights": best, "top_indices": indices}


def test_a_score_beyond_float32_is_an_error_at_the_stage_that_shows_it(call: Any) -> None:
    key = [[[0.0, 1.0], [-1e30, 0.0]]]
    body = {**SMALL, "query": [[[1e30, 0.0]]], "key": key, "returns": ["weights"]}
    assert call("POST", "/v1/attention", json=body).json()["weights"] == [[[1.0, 0.0]]]
    response = call("POST", "/v1/attention", json={**body, "stage": "raw"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "non_finite")


@pytest.mark.parametrize(("asked", "rows"), [({}, 59), ({"audit_rows": 59}, 59), ({"audit_rows": 459}, 459)])
def test_the_audit_reads_as_many_rows_as_asked(call: Any, asked: dict[str, int], rows: int) -> None:
    tensors = {name: torch.randn(2, 600, 8) for name in ("query", "key", "value")}
    options = json.dumps({"mode": "sparse", "max_error": 1, **asked})
    headers = {"content-type": "application/x-safetensors"}
    response = call("POST", "/v1/attention", content=save(tensors, metadata={"options": options}), headers=headers)
    assert response.json()["error"]["kind"] == "measured"
    assert response.json()["error"]["rows"] == 2 * rows  # of each head


def test_the_masked_tail_may_hold_anything_and_an_empty_row_is_zero(call: Any) -> None:
    nan = struct.pack("<4f", 1.0, 0.0, float("nan"), float("inf"))
    key = {"dtype": "float32", "shape": [1, 2, 2], "data": base64.b64encode(nan).decode()}
    body = call("POST", "/v1/attention", json={**SMALL, "key": key, "kv_lengths": [1]}).json()
    assert body["output"] == [[[1.0, 2.0]]]
    body = call("POST", "/v1/attention", json={**SMALL, "kv_lengths": [0], "returns": ["output", "lse"]}).json()
    assert body["output"] == [[[0.0, 0.0]]]
    assert body["lse"] == [[None]]  # -inf: JSON has no infinities


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("rank", {"query": [1.0]}, 422, "query"),
    ("heads", {"query": [[[1, 0]]] * 3, "key": [[[1, 0]]] * 2, "value": [[[1, 0]]] * 2}, 422, "query"),
    ("head_dim", {"key": [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]}, 422, "key"),
    ("keys and values", {"value": [[[1.0, 2.0]]]}, 422, "value"),
    ("ragged", {"query": [[[1.0], [1.0, 2.0]]]}, 422, "query"),
    ("overflow to inf", {"query": [[[1e300, 0.0]]]}, 422, "query"),
    ("missing", {"query": None}, 422, "query"),
    ("base64", {"query": {"dtype": "float32", "shape": [1, 1, 2], "data": "#" * 12}}, 400, "query"),
    ("unknown option", {"is_casual": True}, 422, "is_casual"),
    ("bad mode", {"mode": "fast"}, 422, "mode"),
    ("bad scale", {"scale": -1}, 422, "scale"),
    ("rows", {"returns": ["weights"], "rows": [7]}, 422, "rows"),
    ("mask shape", {"attn_mask": [[True, False, True]]}, 422, "attn_mask"),
    ("kv_lengths", {"kv_lengths": [3]}, 422, "kv_lengths"),
    ("sparse but exact", {"mode": "sparse", "max_error": 0}, 422, "max_error"),
    ("timeout", {"timeout_s": 0}, 422, "timeout_s"),
    ("stage", {"stage": "logits", "returns": ["weights"]}, 422, "stage"),
    ("stage of nothing", {"stage": "raw"}, 422, "stage"),
    ("stage of lse", {"stage": "masked", "returns": ["output", "lse"]}, 422, "stage"),
    ("audit rows", {"audit_rows": 100}, 422, "audit_rows"),
]


@pytest.mark.parametrize(("name", "change", "status", "param"), WRONG, ids=[case[0] for case in WRONG])
def test_wrong_input_is_named(call: Any, name: str, change: dict[str, Any], status: int, param: str) -> None:
    response = call("POST", "/v1/attention", json={**SMALL, **change})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert message(response)
    assert response.headers["x-request-id"]


def test_nan_is_422_and_broken_json_400(call: Any) -> None:
    headers = {"content-type": "application/json"}
    nan = json.dumps({**SMALL, "query": [[[float("nan"), 0.0]]]})
    response = call("POST", "/v1/attention", content=nan, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "non_finite")
    assert call("POST", "/v1/attention", content="{", headers=headers).status_code == 400
    assert call("POST", "/v1/attention", content="", headers=headers).status_code == 400


def test_truncated_safetensors_is_400(call: Any) -> None:
    body = save({name: torch.ones(1, 1, 4, 4) for name in ("query", "key", "value")})
    headers = {"content-type": "application/x-safetensors"}
    for cut in (1, 50, len(body) - 4, len(body)):
        response = call("POST", "/v1/attention", content=body[: len(body) - cut], headers=headers)
        assert response.status_code == 400
        assert "safetensors" in message(response)


def test_a_3_gb_body_is_refused_by_its_length(call: Any, engine: Engine) -> None:
    headers = {"content-type": "application/x-safetensors", "content-length": str(3 * 10**9)}

    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    response = call("POST", "/v1/attention", content=never(), headers=headers)
    assert response.status_code == 413
    assert "3000000000" in message(response)
    assert engine.inflight.total == 0


def test_a_body_without_a_length_is_stopped_while_it_streams(call: Any, engine: Engine) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 24
            yield bytes(1 << 24)

    headers = {"content-type": "application/x-safetensors", "transfer-encoding": "chunked"}
    response = call("POST", "/v1/attention", content=endless(), headers=headers)
    assert response.status_code == 413
    assert sent <= engine.config.max_request_bytes + 2 * (1 << 24)
    assert engine.inflight.total == 0


def test_a_large_json_is_sent_to_the_binary_form(call: Any, engine: Engine) -> None:
    body = b" " * (engine.config.max_json_bytes + 1)
    response = call("POST", "/v1/attention", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "binary" in message(response)


@pytest.mark.parametrize("header", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
def test_unknown_content_is_415(call: Any, header: dict[str, str]) -> None:
    headers = {"content-type": "application/json", **header}
    assert call("POST", "/v1/attention", content=b"{}", headers=headers).status_code == 415


def test_the_timeout_header_counts(call: Any) -> None:
    assert call("POST", "/v1/attention", json=SMALL, headers={"x-request-timeout-seconds": "soon"}).status_code == 400
    late = call("POST", "/v1/attention", json=SMALL, headers={"x-request-timeout-seconds": "0.000001"})
    assert late.status_code == 504
    assert call("POST", "/v1/attention", json=SMALL, headers={"x-request-timeout-seconds": "30"}).status_code == 200


def test_the_callers_request_id_is_kept_and_a_strange_one_replaced(call: Any) -> None:
    assert call("POST", "/v1/attention", json=SMALL, headers={"x-request-id": "mine-1"}).json()["id"] == "mine-1"
    odd = call("POST", "/v1/attention", json=SMALL, headers={"x-request-id": "a b\\n" * 90})
    assert len(odd.json()["id"]) == 32


def test_embeddings(call: Any) -> None:
    body = {"model": "all-MiniLM-L6-v2", "input": ["one", "two words"]}
    response = call("POST", "/v1/embeddings", json=body)
    document = response.json()
    assert response.status_code == 200
    assert set(response.headers) >= HEADERS
    assert [entry["index"] for entry in document["data"]] == [0, 1]
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"] == 7
    encoded = call("POST", "/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    raw = base64.b64decode(encoded["data"][1]["embedding"])
    assert list(struct.unpack("<384f", raw)) == pytest.approx(document["data"][1]["embedding"], abs=1e-6)
    ids = call("POST", "/v1/embeddings", json={**body, "input": [[101, 2028, 102], [101, 2048, 2616, 102]]}).json()
    assert ids["data"][0]["embedding"] == pytest.approx(document["data"][0]["embedding"], abs=1e-6)
    flat = call("POST", "/v1/embeddings", json={**body, "input": [101, 2028, 102]}).json()
    assert flat["data"][0]["embedding"] == pytest.approx(document["data"][0]["embedding"], abs=1e-6)


def test_long_text_is_refused_or_cut_and_told(call: Any) -> None:
    body = {"model": "all-MiniLM-L6-v2", "input": "word " * 400}
    response = call("POST", "/v1/embeddings", json=body)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "402 tokens" in message(response)
    assert "256" in message(response)
    usage = call("POST", "/v1/embeddings", json={**body, "truncate": "end"}).json()["usage"]
    assert (usage["prompt_tokens"], usage["truncated"], usage["dropped_tokens"]) == (256, 1, 146)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-9"}, 404),
        ({"input": []}, 422),
        ({"input": [1.5]}, 422),
        ({"dimensions": 9999}, 422),
        ({"input": [[]]}, 422),
    ],
)
def test_wrong_embeddings_requests(call: Any, change: dict[str, Any], status: int) -> None:
    response = call("POST", "/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": "a", **change})
    assert response.status_code == status
    assert message(response)


def test_estimate_by_sizes(call: Any) -> None:
    sizes = {"heads": 8, "query_length": 100_000, "head_dim": 64, "is_causal": True}
    body = call("POST", "/v1/estimate", json={"attention": sizes}).json()
    for kind in ("dense", "chunked", "sparse"):
        plan = body[kind]
        assert set(plan) == {"flops", "bytes", "peak_bytes", "predicted_s", "cost_usd", "fits", "reason"}
    assert body["dense"]["flops"] == 4 * 64 * 8 * 100_000 * 100_001 // 2
    assert body["chosen"]["kind"] in ("dense", "chunked", "sparse")
    assert body["would_admit"] is True


def test_estimate_of_the_absurd_is_a_number_not_an_error(call: Any) -> None:
    sizes = {"batch": 2**16, "heads": 2**16, "query_length": 2**32, "head_dim": 2**16}
    body = call("POST", "/v1/estimate", json={"attention": sizes}).json()
    assert body["dense"]["flops"] > 2**100
    assert body["would_admit"] is False
    assert call("POST", "/v1/estimate", json={"attention": {**sizes, "batch": 2**40}}).status_code == 422


def test_a_timeout_of_ages_is_no_error(call: Any) -> None:
    assert call("POST", "/v1/attention", json={**SMALL, "timeout_s": 1e300}).status_code == 200


def test_estimate_of_real_requests(call: Any) -> None:
    body = call("POST", "/v1/estimate", json={"endpoint": "/v1/attention", "request": SMALL}).json()
    assert body["dense"]["flops"] == 16
    request = {"model": "all-MiniLM-L6-v2", "input": "How much does this cost?"}
    body = call("POST", "/v1/estimate", json={"endpoint": "/v1/embeddings", "request": request}).json()
    answer = call("POST", "/v1/embeddings", json=request).json()
    assert body["dense"]["flops"] == answer["usage"]["flops"]
    wrong = {"heads": 1, "query_length": 8, "head_dim": 8, "mode": "fast"}
    assert call("POST", "/v1/estimate", json={"attention": wrong}).status_code == 422
    assert call("POST", "/v1/estimate", json={}).status_code == 422
    assert call("POST", "/v1/estimate", json={"endpoint": "/v1/attention"}).status_code == 422


def test_operations(call: Any) -> None:
    assert call("GET", "/healthz").json() == {"status": "alive"}
    assert call("GET", "/readyz").json() == {"status": "ready", "models": ["all-MiniLM-L6-v2"]}
    models = call("GET", "/v1/models").json()
    assert models["data"][0]["id"] == "all-MiniLM-L6-v2"
    assert models["data"][0]["max_length"] == 256
    assert call("GET", "/v1/models/all-MiniLM-L6-v2").json()["dimensions"] == 384
    assert call("GET", "/v1/models/other").status_code == 404
    assert call("GET", "/docs").status_code == 200


def test_unknown_routes_and_methods_look_like_every_other_error(call: Any) -> None:
    response = call("GET", "/v1/nothing")
    assert response.status_code == 404
    assert message(response)
    response = call("GET", "/v1/attention")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert call("GET", "/v2/nothing").json()["error"]
    assert isinstance(call("GET", "/v2/nothing").json()["error"], str)


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/openapi.json", "/docs", "/v1/models", "/v1/models/", "/v2/", "/none"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_every_answer_has_one_request_id_and_none_is_a_redirect(call: Any, method: str, path: str) -> None:
    for given in ("mine-1", "not valid", None):
        response = call(method, path, headers={} if given is None else {"x-request-id": given})
        assert response.status_code in (200, 404, 405)
        found = response.headers.get_list("x-request-id")
        assert len(found) == 1
        assert (found == ["mine-1"]) == (given == "mine-1")
        assert found != ["not valid"]


def test_openapi_has_the_form_of_errors(call: Any) -> None:
    document = call("GET", "/openapi.json").json()
    checker = {name: Draft202012Validator(document["components"]["schemas"][name]) for name in ("Error", "ErrorText")}
    for path, name in (("/v1/attention", "Error"), ("/v2/models/{name}/infer", "ErrorText")):
        for status, response in document["paths"][path]["post"]["responses"].items():
            if int(status) >= 400:
                assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
    for path, name in (("/v1/attention", "Error"), ("/v2/models/attention/infer", "ErrorText")):
        wrong = call("POST", path, content=b"{")
        checker[name].validate(wrong.json())
        assert wrong.status_code == 400
        other = checker["Error" if name == "ErrorText" else "ErrorText"]
        assert not other.is_valid(wrong.json())
    busy = error_response(FarsightError(Kind.OVERLOADED, "full", retry_after_s=0.5))
    checker["Error"].validate(json.loads(bytes(busy.body)))


def test_openapi_shows_the_errors_and_the_bodies(call: Any) -> None:
    document = call("GET", "/openapi.json").json()
    assert errors_table() in document["info"]["description"]
    route = document["paths"]["/v1/attention"]["post"]
    assert set(route["requestBody"]["content"]) == {"application/json", "application/x-safetensors"}
    references = re.findall(r'"\$ref":"#/([^"]+)"', call("GET", "/openapi.json").text.replace('": "', '":"'))
    assert len(references) > 5
    for path in references:
        found = document
        for part in path.split("/"):
            found = found[part]
    options = document["components"]["schemas"]["AttentionRequest"]["properties"]
    assert options["stage"]["enum"] == ["raw", "capped", "masked", "softmax"]
    assert {459, 59} <= set(options["audit_rows"]["anyOf"][0]["enum"])
    assert all(options[name]["description"] for name in ("stage", "audit_rows"))
    assert set(route["responses"]) >= {"400", "413", "415", "422", "429", "500", "503", "504", "507"}


def test_open_inference_over_http(call: Any) -> None:
    assert call("GET", "/v2").json()["name"] == "farsight"
    assert call("GET", "/v2/health/live").status_code == 200
    assert call("GET", "/v2/health/ready").status_code == 200
    assert call("GET", "/v2/models/attention/ready").status_code == 200
    assert call("GET", "/v2/models/other/ready").status_code == 404
    assert call("GET", "/v2/models/all-MiniLM-L6-v2/versions/1").json()["inputs"]
    one = {"name": "query", "datatype": "FP32", "shape": [1, 1, 2], "data": [1.0, 0.0]}
    two = {"datatype": "FP32", "shape": [1, 2, 2]}
    inputs = [one, {"name": "key", "data": [1, 0, 0, 1], **two}, {"name": "value", "data": [1, 2, 3, 4], **two}]
    response = call("POST", "/v2/models/attention/infer", json={"inputs": inputs, "id": "oip"})
    assert response.status_code == 200
    expected = call("POST", "/v1/attention", json=SMALL).json()["output"][0][0]
    assert response.json()["outputs"][0]["data"] == pytest.approx(expected)
    assert set(response.headers) >= HEADERS
    response = call("POST", "/v2/models/attention/infer", json={"inputs": inputs[:2]})
    assert response.status_code == 422
    assert isinstance(response.json()["error"], str)


def test_a_bug_shows_the_id_and_nothing_else(call: Any, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret path /etc/passwd")

    monkeypatch.setattr(engine, "submit", broken)
    response = call("POST", "/v1/attention", json=SMALL, headers={"x-request-id": "bug-1"})
    assert response.status_code == 500
    assert message(response) == "internal error; request id bug-1"


@pytest.mark.parametrize(
    "change",
    [
        {"query": [[[1e30, 0.0]]], "key": [[[1e30, 0.0], [-1e30, 1.0]]]},
        {"scale": 1e38, "query": [[[1e9, 0.0]]]},
        {"value": [[[3e38, 3e38], [3e38, 3e38]]], "query": [[[0.0, 0.0]]], "softcap": 1e-320},
    ],
)
def test_an_overflow_is_an_error_never_a_nan(call: Any, change: dict[str, Any]) -> None:
    response = call("POST", "/v1/attention", json={**SMALL, **change})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "non_finite")


@pytest.mark.parametrize("value", [["1", 2], [1.0, 2], [True], [["5"]]])
def test_inputs_are_not_guessed_at(call: Any, value: Any) -> None:
    assert call("POST", "/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": value}).status_code == 422


def test_top_weights_have_a_size_limit_too(call: Any) -> None:
    size = {"dtype": "float32", "shape": [1, 16384, 1], "data": base64.b64encode(bytes(4 * 16384)).decode()}
    body = {"query": size, "key": size, "value": size, "returns": ["top_weights"], "top_k": 1024}
    response = call("POST", "/v1/attention", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "weights_too_large")
    assert call("POST", "/v1/attention", json={**SMALL, "returns": ["weights"], "rows": [0, 0]}).status_code == 422


def test_odd_safetensors_headers(call: Any) -> None:
    entry = {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": None, "query": entry}).encode()
    body = struct.pack("<Q", len(header)) + header + bytes(4)
    response = call("POST", "/v1/attention", content=body, headers={"content-type": "application/x-safetensors"})
    assert response.status_code in (400, 422)
    huge = {"dtype": "float32", "shape": [2**30, 2**30, 0], "data": ""}
    assert call("POST", "/v1/attention", json={**SMALL, "query": huge}).status_code == 422


def test_idle_uploads_take_nobodys_room(call: Any, engine: Engine) -> None:
    async def idle_and_one_more() -> int:
        app = create_app(engine)
        head = {"content-type": "application/x-safetensors", "content-length": str(engine.config.max_request_bytes)}

        async def nothing() -> AsyncIterator[bytes]:
            await asyncio.sleep(60)
            yield b""

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            idle = [
                asyncio.create_task(client.post("/v1/attention", content=nothing(), headers=head)) for _ in range(9)
            ]
            await asyncio.sleep(0.1)
            answer = await client.post("/v1/attention", json=SMALL)
            for task in idle:
                task.cancel()
            await asyncio.gather(*idle, return_exceptions=True)
            return answer.status_code

    assert asyncio.run(idle_and_one_more()) == 200
    assert engine.inflight.total == 0


def test_a_client_that_leaves_its_upload_is_no_bug(engine: Engine, registry: CollectorRegistry) -> None:
    labels = {"endpoint": "attention", "model": "unknown", "plan": "none"}
    before = registry.get_sample_value("farsight_requests_total", {**labels, "code": "499"}) or 0
    scope = {"type": "http", "method": "POST", "path": "/v1/attention", "headers": [(b"content-length", b"1000")]}

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        return None

    asyncio.run(create_app(engine)(scope, receive, send))
    assert registry.get_sample_value("farsight_requests_total", {**labels, "code": "499"}) == before + 1


def test_an_upload_that_does_not_end_is_ended(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "config", engine.config.model_copy(update={"default_timeout_s": 0.05}))
    scope = {"type": "http", "method": "POST", "path": "/v1/attention", "headers": [(b"content-length", b"1000")]}
    messages: list[Any] = []
    is_first = True

    async def receive() -> dict[str, Any]:
        nonlocal is_first
        if not is_first:
            await asyncio.sleep(3600)
        is_first = False
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(create_app(engine)(scope, receive, send))
    assert messages[0]["status"] == 504
    assert b"slow_upload" in messages[1]["body"]
    assert engine.inflight.total == 0


@pytest.mark.parametrize(("said", "sent"), [(b"1000", 3), (b"2", 3), (b"00000000000000000000003", 3)])
def test_a_body_is_as_long_as_it_says(engine: Engine, said: bytes, sent: int) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/attention", "headers": [(b"content-length", said)]}
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}  "[:sent], "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(create_app(engine)(scope, receive, send))
    is_counted = len(said) < 20  # an absurd number is not a length
    assert messages[0]["status"] == (400 if is_counted else 422)
    assert (b"content-length: expected" in messages[1]["body"]) == is_counted
    assert engine.inflight.total == 0
