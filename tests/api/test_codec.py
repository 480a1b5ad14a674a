"""Tensors in and out of `/v1` bodies: what is wrong is named, and nothing is made before its size is checked."""

from __future__ import annotations

import base64
import json
import struct

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from service.api import codec
from service.errors import FarsightError, Kind


def refusal(call: object, *arguments: object) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


@pytest.mark.parametrize("dtype", codec.DTYPES)
def test_base64_round_trip(dtype: str) -> None:
    tensor = (torch.randn(2, 3, 5) > 0) if dtype == "bool" else torch.randn(2, 3, 5).to(codec.DTYPES[dtype])
    document = orjson.loads(orjson.dumps(codec.tensor_to_json(tensor, encoded=True)))
    again = codec.tensor_from_json("query", document)
    assert again.dtype == tensor.dtype
    assert torch.equal(again, tensor)


def test_nested_lists_are_float32_and_masks_of_booleans_bool() -> None:
    assert codec.tensor_from_json("query", [[1, 2.5]]).tolist() == [[1.0, 2.5]]
    assert codec.tensor_from_json("query", [[1, 2]]).dtype is torch.float32
    assert codec.tensor_from_json("attn_mask", [[True, False]]).dtype is torch.bool


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1], [1, 2]], "ragged"),
        ([["a"]], "expected numbers"),
        ([[None]], "expected numbers"),
        ("text", "expected nested lists"),
        (3, "expected nested lists"),
        ({"dtype": "float32", "shape": [1]}, "exactly dtype, shape and data"),
        ({"dtype": "int4", "shape": [1], "data": ""}, "dtype must be one of"),
        ({"dtype": "float32", "shape": [-1], "data": ""}, "shape must be a list of sizes"),
        ({"dtype": "float32", "shape": [True], "data": ""}, "shape must be a list of sizes"),
        ({"dtype": "float32", "shape": [2], "data": "AAAA"}, "needs 8 bytes, data has 3"),
        ({"dtype": "float32", "shape": [10**6, 10**6], "data": "AAAA"}, "needs 4000000000000 bytes"),
        ({"dtype": "float32", "shape": [1], "data": "A" * 4000}, "needs 4 bytes, data has 3000"),
    ],
)
def test_wrong_tensors_are_refused_by_name(value: object, message: str) -> None:
    error = refusal(codec.tensor_from_json, "key", value)
    assert error.kind is Kind.INVALID
    assert error.param == "key"
    assert message in error.message


def test_bad_base64_cannot_be_parsed() -> None:
    error = refusal(codec.tensor_from_json, "key", {"dtype": "float32", "shape": [1], "data": "!!!!!!!="})
    assert error.kind is Kind.MALFORMED
    assert "base64" in error.message


@pytest.mark.parametrize("number", [1e300, -1e39, 10**40])
def test_a_number_beyond_float32_is_refused_by_name(number: float) -> None:
    error = refusal(codec.tensor_from_json, "query", [[0.5, number]])
    assert (error.kind, error.param) == (Kind.INVALID, "query")


@pytest.mark.parametrize("text", ['{"query": [NaN]}', '{"query": [-Infinity]}'])
def test_nan_literals_are_named(text: str) -> None:
    error = refusal(codec.parse_json, text.encode())
    assert (error.kind, error.code) == (Kind.INVALID, "non_finite")


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"a": 1} x'])
def test_what_is_not_a_json_object_is_malformed(text: str) -> None:
    assert refusal(codec.parse_json, text.encode()).kind is Kind.MALFORMED


def test_safetensors_carry_options_in_their_metadata() -> None:
    body = save({"query": torch.ones(1, 2)}, metadata={"options": json.dumps({"is_causal": True})})
    tensors, options = codec.tensors_from_safetensors(body)
    assert torch.equal(tensors["query"], torch.ones(1, 2))
    assert options == {"is_causal": True}


def test_safetensors_answers_carry_the_rest_in_their_metadata() -> None:
    body = codec.dump_safetensors({"output": torch.ones(2, 2).T}, {"plan": {"kind": "dense"}})
    header = orjson.loads(body[8 : 8 + struct.unpack("<Q", body[:8])[0]])
    assert orjson.loads(header["__metadata__"]["answer"]) == {"plan": {"kind": "dense"}}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), value=st.integers(0, 255))
def test_broken_safetensors_are_refused_whatever_is_broken(cut: int, flip: int, value: int) -> None:
    body = bytearray(save({"query": torch.ones(2, 2), "key": torch.ones(2, 2)}, metadata={"options": "{}"}))
    body[flip % len(body)] = value
    refused: FarsightError | None = None
    tensors: dict[str, torch.Tensor] = {}
    try:
        tensors, _ = codec.tensors_from_safetensors(bytes(body[: len(body) - cut]))
    except FarsightError as error:
        refused = error
    if refused is not None:
        assert refused.kind in (Kind.MALFORMED, Kind.INVALID)
    else:
        assert cut == 0
        assert all(tensor.numel() <= 8 for tensor in tensors.values())


def test_safetensors_with_a_strange_dtype_are_refused() -> None:
    error = refusal(codec.tensors_from_safetensors, save({"query": torch.ones(2, dtype=torch.int32)}))
    assert (error.kind, error.param) == (Kind.INVALID, "query")


def test_lse_of_an_empty_row_is_null_in_lists_and_infinite_in_base64() -> None:
    lse = torch.tensor([0.5, -torch.inf])
    assert orjson.loads(codec.dump_json({"lse": codec.tensor_to_json(lse, encoded=False)}))["lse"] == [0.5, None]
    data = codec.tensor_to_json(lse, encoded=True)["data"]
    assert struct.unpack("<2f", base64.b64decode(data))[1] == float("-inf")


def test_missing_tensors_are_named() -> None:
    assert refusal(codec.split_tensors, {"query": [1], "key": [1]}).param == "value"
