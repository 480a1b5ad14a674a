"""Tensors of the Open Inference Protocol: raw little-endian bytes, or lists of numbers, to torch tensors and back."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from service.api.number_lists import BOOLS, INTEGERS, NUMBERS, array_of
from service.errors import invalid

assert sys.byteorder == "little", "bug: raw tensors are little endian, and bytes are not swapped here"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()} | {torch.uint8: "UINT8"}  # of outputs
RAW_ONLY = frozenset({"FP16", "BF16"})  # no JSON form, no typed field in gRPC
_ACCEPTED: dict[str, dict[frozenset[type], type]] = {  # elements of a list, and what they become
    "BOOL": {BOOLS: np.bool_},
    "INT32": {INTEGERS: np.int32},
    "INT64": {INTEGERS: np.int64},
    "FP32": {NUMBERS: np.float64},
    "FP64": {NUMBERS: np.float64},
}

MAX_RANK = 8
MAX_ELEMENTS = 2**62  # torch computes strides in int64
COPY_BELOW_BYTES = 4096  # CPython shares tiny bytes objects between unrelated owners; a copy is cheap there

Value = torch.Tensor | list[bytes]  # list: BYTES


def element_count(name: str, shape: Sequence[int]) -> int:
    """Product of the dimensions, in Python integers, which do not overflow. Raises INVALID."""
    if len(shape) > MAX_RANK:
        raise invalid(f"{name}: expected at most {MAX_RANK} dimensions, got {len(shape)} dimensions", param=name)
    if any(size < 0 for size in shape):
        raise invalid(f"{name}: shape {list(shape)} has a negative dimension", param=name)
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise invalid(f"{name}: shape {list(shape)} has too many elements", param=name)
    return math.prod(shape)


def dtype_of(name: str, datatype: str) -> torch.dtype:
    """The torch dtype of a datatype other than BYTES. Raises INVALID if it is unknown."""
    if datatype not in DTYPES:
        raise invalid(
            f"{name}: datatype: expected one of {', '.join([*DTYPES, 'BYTES'])}, got {datatype[:32]!r}", param=name
        )
    return DTYPES[datatype]


def claimed_bytes(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Bytes of the raw tensor by its own description; of BYTES, the length prefixes only. Raises INVALID."""
    count = element_count(name, shape)
    return count * (4 if datatype == "BYTES" else dtype_of(name, datatype).itemsize)


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | bytearray | memoryview) -> Value:
    """Raw bytes -> tensor of `shape`, or the strings of a BYTES tensor.

    Nothing is allocated before the size is known to be right. The tensor shares the memory of `data`, and keeps it
    alive, if its alignment allows it: callers must not write to it. Raises INVALID.
    """
    count = element_count(name, shape)
    if datatype == "BYTES":
        return _strings(name, count, memoryview(data))
    dtype = dtype_of(name, datatype)
    size = memoryview(data).nbytes
    if size != count * dtype.itemsize:
        raise invalid(f"{name}: {datatype} {list(shape)} takes {count * dtype.itemsize} bytes, got {size}", param=name)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = _view(data, torch.uint8 if dtype == torch.bool else dtype)
    if dtype == torch.bool:
        if int(flat.max()) > 1:
            raise invalid(f"{name}: expected BOOL bytes of 0 or 1", param=name)
        flat = flat.view(torch.bool)
    return flat.reshape(tuple(shape))


def _view(data: bytes | bytearray | memoryview, dtype: torch.dtype) -> torch.Tensor:
    """data -> [n], sharing and keeping its memory where that is safe and aligned; else a copy."""
    view = memoryview(data)
    # read-only memory that is not of `bytes` may still be written to by its owner
    if view.readonly and (not isinstance(view.obj, bytes) or view.nbytes < COPY_BELOW_BYTES):
        view = memoryview(bytearray(view))
    # neither torch.frombuffer nor torch.from_numpy: both warn about read-only memory
    octets: torch.Tensor = from_dlpack(np.frombuffer(view, np.uint8))
    # a JSON header of any length may precede the tensors of a body: kernels need them on their own boundary
    return (octets if octets.data_ptr() % dtype.itemsize == 0 else octets.clone()).view(dtype)


def _strings(name: str, count: int, data: memoryview) -> list[bytes]:
    """Elements of a BYTES tensor: each is its length, 4 bytes little endian, then that many bytes."""
    if count * 4 > data.nbytes:
        raise invalid(f"{name}: {count} BYTES elements take at least {count * 4} bytes, got {data.nbytes}", param=name)
    strings, at = [], 0
    for index in range(count):
        if at + 4 > data.nbytes:
            raise invalid(f"{name}: ends at byte {data.nbytes}, before element {index} of {count}", param=name)
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > data.nbytes:
            raise invalid(
                f"{name}: element {index} is {length} bytes long, {data.nbytes - at} bytes are left", param=name
            )
        strings.append(bytes(data[at : at + length]))
        at += length
    if at != data.nbytes:
        raise invalid(f"{name}: {count} elements take {at} bytes, got {data.nbytes}", param=name)
    return strings


def from_list(name: str, datatype: str, shape: Sequence[int], data: Any) -> Value:
    """Numbers, flat or nested in row-major order -> tensor of `shape`; strings -> a BYTES tensor. Raises INVALID."""
    count = element_count(name, shape)
    if datatype in RAW_ONLY:
        raise invalid(f"{name}: {datatype} has no form as a list of numbers; send it as raw bytes", param=name)
    if datatype == "BYTES":
        strings = _flat(name, data)
        _check_count(name, datatype, shape, count, len(strings))
        return strings
    dtype = dtype_of(name, datatype)
    array = array_of(
        name, data if isinstance(data, list) else [data], _ACCEPTED[datatype], f"data: expected all {datatype}"
    )
    _check_count(name, datatype, shape, count, array.size)
    with np.errstate(over="ignore"):  # 1e39 becomes infinity, which `check_attention` refuses
        array = array.astype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(array).reshape(tuple(shape))


def _check_count(name: str, datatype: str, shape: Sequence[int], count: int, got: int) -> None:
    if got != count:
        raise invalid(f"{name}: {datatype} {list(shape)} takes {count} elements, got {got}", param=name)


def _flat(name: str, data: Any, depth: int = 0) -> list[bytes]:
    """Strings nested at most MAX_RANK deep, in row-major order."""
    if depth > MAX_RANK:
        raise invalid(f"{name}: data: nested deeper than {MAX_RANK} lists", param=name)
    if isinstance(data, bytes):
        return [data]
    if isinstance(data, str):
        try:
            return [data.encode()]
        except UnicodeEncodeError as error:
            raise invalid(f"{name}: a string is not valid UTF-8", param=name) from error
    if isinstance(data, list):
        return [string for item in data for string in _flat(name, item, depth + 1)]
    raise invalid(f"{name}: data: expected all BYTES (strings)", param=name)


def datatype_of(tensor: torch.Tensor) -> str:
    """The protocol's name of a tensor's dtype."""
    return DATATYPES[tensor.dtype]


def to_numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """[n], row-major, for orjson, which writes infinities as null. 16-bit floats become FP32."""
    tensor = tensor.detach().cpu()
    widened = tensor.float() if datatype_of(tensor) in RAW_ONLY else tensor
    numbers: np.ndarray[Any, Any] = widened.contiguous().reshape(-1).numpy()
    return numbers
