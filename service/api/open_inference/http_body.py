"""HTTP bodies of the Open Inference Protocol: JSON, followed by raw tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from service.api import answer as answers
from service.api.codec import Body, raw_bytes
from service.api.open_inference import tensors
from service.api.open_inference.inputs import InferInput
from service.api.open_inference.metadata import MODEL_VERSION
from service.api.open_inference.parameters import check_no_parameters
from service.api.open_inference.protocol import InferRequest, outputs
from service.api.schema import validated
from service.core.answer import Answer
from service.core.request import Request
from service.errors import invalid, malformed, too_large


class _InputJson(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    datatype: StrictStr
    shape: list[StrictInt]
    parameters: dict[str, Any] | None = None
    data: Any = None


class _OutputJson(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    parameters: dict[str, Any] | None = None


class _RequestJson(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    id: StrictStr | None = None
    inputs: list[_InputJson] = Field(min_length=1)
    outputs: list[_OutputJson] | None = None
    parameters: dict[str, Any] | None = None
    model_name: StrictStr | None = None  # KServe's client repeats the route here
    model_version: StrictStr | None = None


def parse_http(
    body: Body,
    header_length: int | None,
    *,
    model: str,
    model_version: str = "",
    max_json_bytes: int | None = None,
) -> InferRequest:
    """The body of `POST /v2/models/{model}/infer`: JSON, then the raw tensors of its inputs in their order.

    `header_length` is the header Inference-Header-Content-Length, the bytes of JSON in the body; None = all of it.
    Tensors share the memory of `body`. Raises MALFORMED, INVALID or TOO_LARGE.
    """
    view = memoryview(body)
    if header_length is not None and not 0 < header_length <= view.nbytes:
        raise malformed(f"Inference-Header-Content-Length: expected 1 to {view.nbytes} bytes, got {header_length}")
    head = view[:header_length]
    if max_json_bytes is not None and head.nbytes > max_json_bytes:
        raise too_large("JSON part of the body", head.nbytes, max_json_bytes, "bytes; send tensors as binary data")
    try:
        values = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise malformed(f"the JSON part of the body cannot be parsed: {error.msg} at character {error.pos}") from error
    document = validated(_RequestJson, values)
    parameters = document.parameters or {}
    return InferRequest(
        model=model,
        version=model_version,
        id=document.id or "",
        inputs=_inputs(document.inputs, view[head.nbytes :]),
        parameters=parameters,
        outputs=_requested(document.outputs or []),
        binary=_flag(parameters, "binary_data_output") or False,
    )


def _inputs(entries: Sequence[_InputJson], raw: memoryview) -> tuple[InferInput, ...]:
    """Inputs with their data from the JSON or, if they give its size, from `raw`."""
    inputs, at = [], 0
    for entry in entries:
        parameters = dict(entry.parameters or {})
        size = parameters.pop("binary_data_size", None)
        check_no_parameters(entry.name, parameters)
        if (size is None) == (entry.data is None):
            raise invalid(f"{entry.name}: expected exactly one of data and binary_data_size", param=entry.name)
        if size is None:
            value = tensors.from_list(entry.name, entry.datatype, entry.shape, entry.data)
        else:
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise invalid(f"{entry.name}: binary_data_size: expected a number of bytes", param=entry.name)
            if at + size > raw.nbytes:
                left = raw.nbytes - at
                raise malformed(f"{entry.name}: expected {size} binary bytes, got {left}", param=entry.name)
            value = tensors.from_raw(entry.name, entry.datatype, entry.shape, raw[at : at + size])
            at += size
        inputs.append(InferInput(entry.name, entry.datatype, tuple(entry.shape), value))
    if at != raw.nbytes:
        raise malformed(f"inputs: expected {at} binary bytes, got {raw.nbytes}")
    return tuple(inputs)


def _requested(entries: Sequence[_OutputJson]) -> dict[str, bool | None]:
    """Requested outputs: as raw bytes, as JSON, or None for the default."""
    requested: dict[str, bool | None] = {}
    for entry in entries:
        if entry.name in requested:
            raise invalid(f"output {entry.name[:96]!r} is requested twice", param="outputs")
        parameters = dict(entry.parameters or {})
        requested[entry.name] = _flag(parameters, "binary_data")
        parameters.pop("binary_data", None)
        check_no_parameters(entry.name, parameters)
    return requested


def _flag(parameters: Mapping[str, Any], name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{name}: expected true or false", param=name)
    return value


def render_http(
    answer: Answer, request: Request, infer: InferRequest
) -> tuple[bytes | Sequence[memoryview], int | None]:
    """The body of an answer, and its Inference-Header-Content-Length: None if all of it is JSON.

    Binary tensors are parts of the body, not copied. As JSON numbers a 16-bit float tensor is FP32, exactly, and -inf
    (the lse of a row without keys, the score of a masked key) is null.
    """
    entries: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for name, tensor in outputs(answer, request).items():
        entry: dict[str, Any] = {"name": name, "datatype": tensors.datatype_of(tensor), "shape": list(tensor.shape)}
        if infer.is_binary(name):
            raw.append(raw_bytes(tensor))
            entry["parameters"] = {"binary_data_size": raw[-1].nbytes}
        else:
            numbers = tensors.to_numbers(tensor)
            entry |= {"datatype": tensors.datatype_of(torch.from_numpy(numbers)), "data": numbers}
        entries.append(entry)
    document: dict[str, Any] = {"model_name": infer.model, "model_version": MODEL_VERSION}
    if infer.id:
        document["id"] = infer.id
    document |= {"parameters": answers.headers(answer), "outputs": entries}
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return ([memoryview(head), *raw], len(head)) if raw else (head, None)
