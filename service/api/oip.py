"""The Open Inference Protocol (KServe v2) without a transport: what its requests mean, and what answers carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

import orjson
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api.tensors import Value
from service.attention.validate import check_attention
from service.core import (
    Answer,
    AttentionOptions,
    AttentionRequest,
    ForwardRequest,
    ModelInfo,
    Priority,
    Request,
    Returned,
)
from service.errors import FarsightError, Kind, invalid

ATTENTION = "attention"
MODEL_VERSION = "1"
_FLOATS = "FP32"  # the metadata of a tensor names one datatype; FP16 and BF16 are taken as well

# name, datatype, rank with the batch axis
_ATTENTION_INPUTS = (("query", _FLOATS, 4), ("key", _FLOATS, 4), ("value", _FLOATS, 4), ("attn_mask", "BOOL", 4))
_ATTENTION_OUTPUTS = (
    ("output", _FLOATS, 4),
    ("lse", _FLOATS, 3),
    ("weights", _FLOATS, 4),
    ("top_weights", _FLOATS, 4),
    ("top_indices", "INT64", 4),
)
_RETURNED: dict[str, Returned] = {
    "output": "output",
    "lse": "lse",
    "weights": "weights",
    "top_weights": "top_weights",
    "top_indices": "top_weights",
}
_EMBED_INPUTS = (("text", "BYTES", 1), ("input_ids", "INT64", 2), ("attention_mask", "INT64", 2))
_LIST_OPTIONS = frozenset({"window", "kv_lengths", "returns", "rows"})  # JSON text where parameters have no lists
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


@dataclass(frozen=True, slots=True)
class Input:
    """One named tensor of a request; `value` is a list of strings where `datatype` is BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    value: Value


@dataclass(frozen=True, slots=True)
class Infer:
    """What both transports make of an infer request before anything is known of the model."""

    model: str
    version: str
    id: str  # the caller's, echoed; may be empty
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Any]
    outputs: Mapping[str, bool | None] = field(default_factory=dict)  # requested: as raw bytes? None = default
    binary: bool = False  # HTTP: the default of `outputs`

    def is_binary(self, output: str) -> bool:
        pair = "top_weights" if output == "top_indices" else "top_indices" if output == "top_weights" else output
        asked = self.outputs.get(output, self.outputs.get(pair))
        return self.binary if asked is None else asked


class EmbedOptions(BaseModel):
    """Everything of an embed request but its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    truncate: Literal["error", "end"] = "error"
    dimensions: int | None = Field(None, ge=1)
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)


Options = TypeVar("Options", AttentionOptions, EmbedOptions)


# models and metadata


def find_model(name: str, model_version: str, infos: Sequence[ModelInfo]) -> ModelInfo | None:
    """The model of that name, None for `attention` itself; NOT_FOUND names what there is."""
    by_name = {info.name: info for info in infos}
    if name != ATTENTION and name not in by_name:
        known = ", ".join([ATTENTION, *by_name])
        raise FarsightError(Kind.NOT_FOUND, f"model {name[:96]!r} is not served; there are: {known}", param="model")
    if model_version not in ("", MODEL_VERSION):
        raise FarsightError(
            Kind.NOT_FOUND, f"model {name!r} has version {MODEL_VERSION!r} only, not {model_version[:96]!r}"
        )
    return by_name.get(name)


def server_metadata() -> dict[str, Any]:
    try:
        farsight = version("farsight")
    except PackageNotFoundError:  # run from a source tree
        farsight = "unknown"
    return {"name": "farsight", "version": farsight, "extensions": ["binary_tensor_data"]}


def model_metadata(name: str, model_version: str, infos: Sequence[ModelInfo]) -> dict[str, Any]:
    info = find_model(name, model_version, infos)
    document = {"name": name, "versions": [MODEL_VERSION], "platform": "farsight_torch"}
    if info is None:
        return document | {"inputs": _described(_ATTENTION_INPUTS), "outputs": _described(_ATTENTION_OUTPUTS)}
    embedding = {"name": "embedding", "datatype": "FP32", "shape": [-1, info.dimensions]}
    return document | {"inputs": _described(_EMBED_INPUTS), "outputs": [embedding]}


def _described(rows: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": datatype, "shape": [-1] * rank} for name, datatype, rank in rows]


# request


def parse_infer(
    infer: Infer,
    infos: Sequence[ModelInfo],
    *,
    request_id: str,
    timeout_s: float | None = None,
    tenant: str = "default",
) -> Request:
    """The request of the engine; `timeout_s` is the transport's own limit, the shorter one counts."""
    info = find_model(infer.model, infer.version, infos)
    return (
        _attention(infer, request_id, timeout_s, tenant)
        if info is None
        else _embed(infer, info, request_id, timeout_s, tenant)
    )


def _attention(infer: Infer, request_id: str, timeout_s: float | None, tenant: str) -> AttentionRequest:
    values = _inputs(infer, allowed=[name for name, _, _ in _ATTENTION_INPUTS])
    for name in ("query", "key", "value"):
        if name not in values:
            raise invalid(f"input {name!r} is missing", param=name)
    given = {name: _numbers(entry) for name, entry in values.items()}
    options = _options(AttentionOptions, infer.parameters, timeout_s)
    _check_outputs(infer, _RETURNED)
    if infer.outputs:
        asked = options.returns if infer.parameters.get("returns") is not None else ()
        union = dict.fromkeys([*asked, *(_RETURNED[name] for name in infer.outputs)])
        options = options.model_copy(update={"returns": tuple(union)})
    attn_mask = given.get("attn_mask")
    query, key, value = check_attention(given["query"], given["key"], given["value"], attn_mask, options)
    rank = given["query"].ndim
    if rank == 3 and attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask[None]
    return AttentionRequest(
        id=request_id,
        query=query,
        key=key,
        value=value,
        options=options,
        attn_mask=attn_mask,
        rank=rank,
        tenant=tenant,
    )


def _embed(infer: Infer, info: ModelInfo, request_id: str, timeout_s: float | None, tenant: str) -> ForwardRequest:
    values = _inputs(infer, allowed=[name for name, _, _ in _EMBED_INPUTS])
    if ("text" in values) == ("input_ids" in values):
        raise invalid("give exactly one of the inputs 'text' and 'input_ids'", param="text")
    if "text" in values and "attention_mask" in values:
        raise invalid("'attention_mask' belongs to 'input_ids', not to 'text'", param="attention_mask")
    _check_outputs(infer, ("embedding",))
    options = _options(EmbedOptions, infer.parameters, timeout_s)
    return ForwardRequest(
        id=request_id,
        model=info.name,
        task=info.task,
        texts=_texts(values["text"]) if "text" in values else (),
        token_ids=_token_ids(values["input_ids"], values.get("attention_mask")) if "input_ids" in values else (),
        truncate=options.truncate,
        dimensions=options.dimensions,
        priority=options.priority,
        timeout_s=options.timeout_s,
        tenant=tenant,
    )


def _inputs(infer: Infer, *, allowed: Sequence[str]) -> dict[str, Input]:
    values: dict[str, Input] = {}
    for entry in infer.inputs:
        if entry.name not in allowed:
            raise invalid(
                f"input {entry.name[:96]!r} is unknown; {infer.model!r} takes {', '.join(allowed)}",
                param=entry.name[:96],
            )
        if entry.name in values:
            raise invalid(f"input {entry.name!r} is given twice", param=entry.name)
        values[entry.name] = entry
    return values


def _check_outputs(infer: Infer, allowed: Iterable[str]) -> None:
    for name in infer.outputs:
        if name not in allowed:
            raise invalid(
                f"output {name[:96]!r} is unknown; {infer.model!r} gives {', '.join(allowed)}", param="outputs"
            )


def _numbers(entry: Input) -> torch.Tensor:
    if isinstance(entry.value, list):
        raise invalid(f"{entry.name}: datatype BYTES is not a tensor of numbers", param=entry.name)
    return entry.value


def _texts(entry: Input) -> tuple[str, ...]:
    """BYTES [n] or [n, 1], UTF-8."""
    if not isinstance(entry.value, list):
        raise invalid(f"text: expected datatype BYTES, got {entry.datatype}", param="text")
    if len(entry.shape) != 1 and not (len(entry.shape) == 2 and entry.shape[1] == 1):
        raise invalid(f"text: expected shape [n] or [n, 1], got {list(entry.shape)}", param="text")
    try:
        return tuple(text.decode() for text in entry.value)
    except UnicodeDecodeError as error:
        raise invalid("text: an element is not valid UTF-8", param="text") from error


def _token_ids(entry: Input, mask: Input | None) -> tuple[tuple[int, ...], ...]:
    """INT64 [n, L], cut to the ids that `attention_mask` marks: padding never reaches the model."""
    ids = _numbers(entry)
    if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 2:
        raise invalid(f"input_ids: expected INT64 [n, L], got {entry.datatype} {list(entry.shape)}", param="input_ids")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else _padding(mask, ids)
    if not bool(valid.any(dim=1).all()):
        raise invalid("input_ids: a row has no valid id", param="input_ids")
    return tuple(tuple(row[keep].tolist()) for row, keep in zip(ids, valid, strict=True))


def _padding(entry: Input, ids: torch.Tensor) -> torch.Tensor:
    """The mask as bool [n, L]; ones must be one run at the left or the right of each row."""
    mask = _numbers(entry)
    if mask.shape != ids.shape or mask.is_floating_point():
        raise invalid(
            f"attention_mask: expected INT64 or BOOL {list(ids.shape)}, got {entry.datatype} {list(entry.shape)}",
            param="attention_mask",
        )
    steps = mask.to(torch.int64).diff(dim=1)
    binary = bool(((mask == 0) | (mask == 1)).all())
    if not binary or not bool(((steps <= 0).all(dim=1) | (steps >= 0).all(dim=1)).all()):
        raise invalid("attention_mask: each row must be ones and then zeros, or the reverse", param="attention_mask")
    return mask.bool()


# parameters


def _options(model: type[Options], parameters: Mapping[str, Any], timeout_s: float | None) -> Options:
    """Validated options of one model, with the parameters that Triton's clients know translated or ignored."""
    given = {name: value for name, value in parameters.items() if value is not None}
    given.pop("binary_data_output", None)  # HTTP has read it; gRPC is always raw
    for name in _SEQUENCE:
        if given.pop(name, 0) not in (0, "", "0", False):
            raise invalid(f"{name}: sequences are not served", param=name)
    timeout_us = given.pop("timeout", 0)
    if not isinstance(timeout_us, int) or timeout_us < 0:
        raise invalid("timeout: expected microseconds, an integer of 0 or more", param="timeout")
    if "priority" in given and isinstance(given["priority"], int):
        given["priority"] = _priority(given["priority"])
    for name in given.keys() & _LIST_OPTIONS:
        given[name] = _list(name, given[name])
    unknown = sorted(given.keys() - model.model_fields.keys())
    if unknown:
        known = ", ".join(model.model_fields)
        raise invalid(f"parameter {unknown[0][:96]!r} is unknown; there are: {known}", param=unknown[0][:96])
    try:
        options = model.model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error
    limits = [options.timeout_s, timeout_us / 1e6 or None, timeout_s]
    shortest = min((limit for limit in limits if limit is not None), default=None)
    return options.model_copy(update={"timeout_s": shortest})


def _priority(level: int) -> Priority:
    """Triton counts from 1, the most urgent; 0 is the default."""
    if isinstance(level, bool) or level < 0:
        raise invalid("priority: expected 'interactive', 'batch', or an integer of 0 or more", param="priority")
    return Priority.INTERACTIVE if level <= 1 else Priority.BATCH


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{name}: expected a list, as JSON text where parameters are strings", param=name) from error


def refusal(error: ValidationError) -> FarsightError:
    """The first thing that pydantic found, without the value that it found."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return invalid(f"{where}: {first['msg']}", param=str(first["loc"][0]) if first["loc"] else None)


# answer


def outputs(answer: Answer, request: Request) -> dict[str, torch.Tensor]:
    """The tensors to send, by name; without the batch axis where the request came without it."""
    if isinstance(request, ForwardRequest):
        return dict(answer.tensors)
    wanted = {name: tensor for name, tensor in answer.tensors.items() if _RETURNED[name] in request.options.returns}
    if request.rank == 3:
        return {name: one[0] for name, one in wanted.items()}
    return wanted
