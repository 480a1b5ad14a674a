"""safetensors without copies: the library's own reader and writer copy whole tensors, holding the interpreter's lock.

https://github.com/huggingface/safetensors#format: 8 bytes of header length, a JSON header, the tensors without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from service.api.codec import Body, dump_json, parse_json, raw_bytes
from service.api.open_inference.tensors import from_raw
from service.errors import invalid, malformed

MAX_HEADER_BYTES = 1024 * 1024
# to the datatypes of the Open Inference Protocol, and back
DATATYPES = {"F32": "FP32", "F16": "FP16", "BF16": "BF16", "BOOL": "BOOL"}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


def tensors_from_safetensors(body: Body) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Named tensors that share the memory of `body`, and the options from `__metadata__["options"]`."""
    view = memoryview(body)
    size = int.from_bytes(view[:8], "little")
    if view.nbytes < 8 or size > min(view.nbytes - 8, MAX_HEADER_BYTES):
        raise malformed(f"the body is not a valid safetensors file: a header of {size} bytes in {view.nbytes}")
    header = parse_json(view[8 : 8 + size])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not isinstance(text := metadata.get("options", "{}"), str):
        raise malformed("the body is not a valid safetensors file: __metadata__ must map names to text")
    data = view[8 + size :]
    _check_offsets(header, data.nbytes)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DATATYPES:
            dtype = str(entry["dtype"])[:32]
            raise invalid(f"{name[:96]}: dtype {dtype} is not one of {', '.join(DATATYPES)}", param=name)
        start, stop = entry["data_offsets"]
        tensor = from_raw(name[:96], DATATYPES[entry["dtype"]], entry["shape"], data[start:stop])
        assert isinstance(tensor, torch.Tensor), "bug: no dtype here is of strings"
        tensors[name] = tensor
    return tensors, parse_json(text.encode())


def _check_offsets(header: Mapping[str, Any], size: int) -> None:
    """Every byte belongs to one tensor, as the format demands: no two may share memory, none may point outside."""
    end = 0
    for name, entry in sorted(header.items(), key=_start):
        fits = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        fits = fits and isinstance(entry["dtype"], str) and _whole(entry["shape"]) and _whole(entry["data_offsets"])
        if not fits:
            raise malformed(f"the body is not a valid safetensors file: {name[:96]!r} is not described as it demands")
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or offsets[0] != end or offsets[1] < end:
            raise malformed(f"the body is not a valid safetensors file: {name[:96]!r} does not begin at byte {end}")
        end = offsets[1]
    if end != size:
        raise malformed(f"the body is not a valid safetensors file: its tensors take {end} bytes, it has {size}")


def _start(item: tuple[str, Any]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (TypeError, LookupError, ValueError):
        return -1  # refused by name


def _whole(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size < 2**63 for size in sizes)


def dump_safetensors(tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> Sequence[memoryview]:
    """The answer's tensors as they lie in memory, after a header with everything else in `__metadata__["answer"]`."""
    answer = dump_json(document).decode()
    header: dict[str, Any] = {"__metadata__": {"answer": answer}}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # aligned, as they are read
        parts.append(raw_bytes(tensor))
        start, end = end, end + parts[-1].nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]
