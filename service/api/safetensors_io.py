"""Reads and writes safetensors without copies.

The library's own reader and writer copy whole tensors while they hold the interpreter's lock. The format is 8 bytes of
header length, a JSON header and the tensors without gaps: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from service.api.codec import Body, dump_json, parse_json, raw_bytes
from service.api.open_inference.tensors import from_raw
from service.errors import FarsightError, invalid, malformed

MAX_HEADER_BYTES = 1024 * 1024
# accepted dtypes as datatypes of the Open Inference Protocol, and names of the dtypes that are written
DATATYPES = {"F32": "FP32", "F16": "FP16", "BF16": "BF16", "BOOL": "BOOL"}
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}


def tensors_from_safetensors(body: Body) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by name, which share the memory of `body`; the options in `__metadata__["options"]`).

    Raises MALFORMED if the file is broken, INVALID for other dtypes than float32, float16, bfloat16 and bool.
    """
    view = memoryview(body)
    size = int.from_bytes(view[:8], "little")
    if view.nbytes < 8 or size > min(view.nbytes - 8, MAX_HEADER_BYTES):
        raise _broken(f"a header of {size} bytes in {view.nbytes}")
    header = parse_json(view[8 : 8 + size])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not isinstance(text := metadata.get("options", "{}"), str):
        raise _broken("__metadata__ must map names to text")
    data = view[8 + size :]
    _check_offsets(header, data.nbytes)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DATATYPES:
            dtype = str(entry["dtype"])[:32]
            raise invalid(f"{name[:96]}: dtype: expected one of {', '.join(DATATYPES)}, got {dtype}", param=name)
        start, stop = entry["data_offsets"]
        tensor = from_raw(name[:96], DATATYPES[entry["dtype"]], entry["shape"], data[start:stop])
        assert isinstance(tensor, torch.Tensor), "bug: no dtype here is of strings"
        tensors[name] = tensor
    return tensors, parse_json(text.encode())


def _check_offsets(header: Mapping[str, Any], size: int) -> None:
    """Every byte belongs to exactly one tensor, as the format requires: no overlaps, no gaps, nothing outside."""
    end = 0
    for name, entry in sorted(header.items(), key=_start):
        fits = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        fits = fits and isinstance(entry["dtype"], str) and _are_sizes(entry["shape"])
        fits = fits and _are_sizes(entry["data_offsets"])
        if not fits:
            raise _broken(f"{name[:96]!r} needs exactly dtype, shape and data_offsets of their types")
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or offsets[0] != end or offsets[1] < end:
            raise _broken(f"{name[:96]!r} does not begin at byte {end}")
        end = offsets[1]
    if end != size:
        raise _broken(f"its tensors take {end} bytes, it has {size}")


def _broken(reason: str) -> FarsightError:
    return malformed(f"the body is not a valid safetensors file: {reason}")


def _start(item: tuple[str, Any]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (TypeError, LookupError, ValueError):
        return -1  # sorted first, and refused by its name there


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size < 2**63 for size in sizes)


def dump_safetensors(tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> Sequence[memoryview]:
    """Parts of a file: a header with `document` in `__metadata__["answer"]`, then each tensor's own memory."""
    answer = dump_json(document).decode()
    header: dict[str, Any] = {"__metadata__": {"answer": answer}}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # keeps all aligned
        parts.append(raw_bytes(tensor))
        start, end = end, end + parts[-1].nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]
