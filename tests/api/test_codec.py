"""Tensors in and out of `/v1` bodies: what is wrong is named, and nothing is made before its size is checked."""

from __future__ import annotations

import base64
import struct

import orjson
import pytest
import torch

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
        ({"dtype": "int4", "shape": [1], "data": ""}, "dtype: expected one of"),
        ({"dtype": "float32", "shape": [-1], "data": ""}, "shape: expected a list of sizes"),
        ({"dtype": "float32", "shape": [True], "data": ""}, "shape: expected a list of sizes"),
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


def test_lse_of_an_empty_row_is_null_in_lists_and_infinite_in_base64() -> None:
    lse = torch.tensor([0.5, -torch.inf])
    assert orjson.loads(codec.dump_json({"lse": codec.tensor_to_json(lse, encoded=False)}))["lse"] == [0.5, None]
    data = codec.tensor_to_json(lse, encoded=True)["data"]
    assert struct.unpack("<2f", base64.b64decode(data))[1] == float("-inf")


def test_missing_tensors_are_named() -> None:
    assert refusal(codec.split_tensors, {"query": [1], "key": [1]}).param == "value"
