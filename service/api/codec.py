"""JSON of the `/v1` routes, with tensors as nested lists or base64 objects.

Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import torch

from service.api.number_lists import BOOLS, NUMBERS, array_of
from service.errors import FarsightError, invalid, malformed

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
}
MAX_RANK = 4
FLOAT32_MAX = 3.4028234663852886e38
ATTENTION_TENSORS = ("query", "key", "value", "attn_mask")

Body = bytes | bytearray | memoryview


def parse_json(body: Body) -> dict[str, Any]:
    """The JSON object of a body. Raises MALFORMED; INVALID for NaN and Infinity, which are common but not JSON."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if _has_non_finite(body):
            raise invalid("body: expected finite numbers, got NaN or Infinity", code="non_finite") from None
        raise malformed(f"body: expected JSON, got {error.msg} at byte {error.pos}") from None
    if not isinstance(document, dict):
        raise malformed(f"body: expected a JSON object, got {type(document).__name__}")
    return document


def _has_non_finite(body: Body) -> bool:
    """Whether the body is JSON apart from NaN and Infinity, which Python's own encoder writes."""
    found = False

    def constant(_: str) -> float:
        nonlocal found
        found = True
        return math.nan

    try:
        json.loads(bytes(body), parse_constant=constant)
    except (ValueError, RecursionError):
        return False
    return found


def tensor_from_json(name: str, value: Any) -> torch.Tensor:
    """{"dtype", "shape", "data"} -> that tensor; nested lists -> float32, or bool if they are all booleans.

    Tensors from lists are finite: numbers beyond float32 are refused, and JSON has no infinities. Raises INVALID,
    or MALFORMED for data that is not base64.
    """
    if isinstance(value, dict):
        return _from_base64(name, value)
    if not isinstance(value, list):
        raise invalid(f"{name}: expected nested lists or an object with dtype, shape and data", param=name)
    accepted = {NUMBERS: np.float64, BOOLS: np.bool_}
    array = array_of(name, value, accepted, "expected numbers, or booleans, in the nested lists")
    if array.dtype != bool:
        largest = max(array.max(initial=0), -array.min(initial=0))
        if largest > FLOAT32_MAX:
            raise invalid(f"{name}: expected numbers within float32, got {largest:g}", param=name)
        array = array.astype(np.float32)
    return torch.from_numpy(array)


def _from_base64(name: str, value: Mapping[str, Any]) -> torch.Tensor:
    dtype, shape, data = value.get("dtype"), value.get("shape"), value.get("data")
    if set(value) != {"dtype", "shape", "data"} or not isinstance(data, str):
        raise invalid(f"{name}: expected exactly dtype, shape and data (base64 text)", param=name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise invalid(f"{name}: dtype: expected one of {', '.join(DTYPES)}, got {str(dtype)[:32]!r}", param=name)
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise invalid(f"{name}: shape: expected a list of sizes", param=name)
    if len(shape) > MAX_RANK or 0 in shape:
        raise invalid(f"{name}: shape: expected at most {MAX_RANK} sizes, none of them 0, got {shape[:8]}", param=name)
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    # the length of the text bounds its bytes before they are decoded
    if expected > 3 * (len(data) // 4 + 1):
        raise invalid(f"{name}: {dtype} {shape} needs {expected} bytes, data has {3 * len(data) // 4}", param=name)
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise malformed(f"{name}: data: expected valid base64", param=name) from None
    if len(raw) != expected:
        raise invalid(f"{name}: {dtype} {shape} needs {expected} bytes, data has {len(raw)}", param=name)
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def split_tensors(named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors of an attention body, its other fields). Raises INVALID if query, key or value is missing."""
    tensors = {name: named[name] for name in ATTENTION_TENSORS if named.get(name) is not None}
    for name in ATTENTION_TENSORS[:3]:
        if name not in tensors:
            raise invalid(f"{name} is missing", param=name)
    return tensors, {name: value for name, value in named.items() if name not in ATTENTION_TENSORS}


def tensor_to_json(tensor: torch.Tensor, *, encoded: bool, squeeze: bool = False) -> Any:
    """An object with base64 data if `encoded`, else an array that orjson writes as nested lists.

    `squeeze` drops the first axis, of size 1. JSON has no infinities: in nested lists -inf (the lse of a row without
    keys, the score of a masked key) is null.
    """
    if not encoded:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        array = (tensor.float() if half else tensor).numpy()
        return np.ascontiguousarray(array[0] if squeeze else array)
    tensor = (tensor[0] if squeeze else tensor).contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(raw_bytes(tensor)).decode()}


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major and little-endian; not copied if the tensor is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    array: Any = flat.numpy() if flat.dtype == torch.bool else flat.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def dump_json(document: Mapping[str, Any] | list[Any]) -> bytes:
    """JSON of `document`, in which arrays become nested lists."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def error_document(error: FarsightError) -> dict[str, Any]:
    """The body of a `/v1` error."""
    fields: dict[str, str | float | None] = {
        "message": error.message,
        "type": error.kind.value,
        "code": error.code,
        "param": error.param,
    }
    if error.retry_after_s is not None:
        fields["retry_after_s"] = error.retry_after_s  # exact; the Retry-After header has whole seconds
    return {"error": fields}
