"""The Open Inference Protocol (KServe v2) without a transport: what its requests mean, and what answers carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import orjson
import torch
from pydantic import ValidationError

from service.api.tensors import Value
from service.attention.validate import check_attention
from service.core import (
    Answer,
    AttentionOptions,
    AttentionRequest,
    ClassifyOptions,
    EmbedOptions,
    ForwardOptions,
    ForwardRequest,
    HiddenOptions,
    ModelInfo,
    Priority,
    Request,
    Returned,
    ScoreOptions,
    Task,
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
_IDS = (("input_ids", "INT64", 2), ("attention_mask", "INT64", 2))
# what a model takes, by `ModelInfo.inputs`, and for reranking a query beside each text
_MODEL_INPUTS = {
    "text": (("text", "BYTES", 1), *_IDS),
    "source and target": (("text", "BYTES", 1), ("target", "BYTES", 1), *_IDS),
    "image": (("image", "BYTES", 1), ("pixel_values", "FP32", 4)),
}
_RERANK_INPUTS = (("query", "BYTES", 1), ("text", "BYTES", 1))
_HIDDEN = ("hidden_states", "lengths")
_OPTIONS: dict[Task, type[ForwardOptions]] = {
    "embed": EmbedOptions,
    "classify": ClassifyOptions,
    "rerank": ClassifyOptions,
    "score": ScoreOptions,
    "hidden": HiddenOptions,
}
_LIST_OPTIONS = frozenset(
    {"window", "kv_lengths", "returns", "rows", "positions"}
)  # JSON text where parameters have no lists
MAX_IDS = 4 * 1024**2  # of one request: each becomes a Python integer
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


Options = TypeVar("Options", AttentionOptions, ForwardOptions)


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
    outputs = [
        {"name": name, "datatype": datatype, "shape": list(shape)} for name, datatype, shape in _model_outputs(info)
    ]
    return document | {"inputs": _described(_model_inputs(info)), "outputs": outputs}


def _model_inputs(info: ModelInfo) -> tuple[tuple[str, str, int], ...]:
    return (*_RERANK_INPUTS, *_IDS) if info.task == "rerank" else _MODEL_INPUTS[info.inputs]


def _model_outputs(info: ModelInfo) -> list[tuple[str, str, tuple[int, ...]]]:
    """What its task gives, and the hidden states of all tokens with the length of each input."""
    own: list[tuple[str, str, tuple[int, ...]]]
    match info.task:
        case "embed":
            own = [("embedding", _FLOATS, (-1, info.dimensions))]
        case "classify" | "rerank":
            own = [("scores", _FLOATS, (-1, len(info.labels)))]
        case "score":
            own = [("logprob_sum", _FLOATS, (-1,)), ("scored_tokens", "INT64", (-1,))]
    return [*own, ("hidden_states", _FLOATS, (-1, info.dimensions)), ("lengths", "INT64", (-1,))]


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
        else _forward(infer, info, request_id, timeout_s, tenant)
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


def _forward(infer: Infer, info: ModelInfo, request_id: str, timeout_s: float | None, tenant: str) -> ForwardRequest:
    """The model's own task, or the hidden states where those outputs are asked for (or `layer` is given)."""
    values = _inputs(infer, allowed=[name for name, _, _ in _model_inputs(info)])
    _check_outputs(infer, [name for name, _, _ in _model_outputs(info)])
    asked = [name in _HIDDEN for name in infer.outputs]
    if any(asked) and not all(asked):
        raise invalid(f"outputs: {' and '.join(_HIDDEN)} come without the model's other outputs", param="outputs")
    task: Task = "hidden" if any(asked) or "layer" in infer.parameters else info.task
    options = _options(_OPTIONS[task], infer.parameters, timeout_s)
    given = _given(values, info, task)
    return ForwardRequest(request_id, info.name, task, options, tenant=tenant, **given)


def _given(values: Mapping[str, Input], info: ModelInfo, task: Task) -> dict[str, Any]:
    """The inputs as `ForwardRequest` names them; exactly one kind of them."""
    kinds = [name for name in ("text", "input_ids", "image", "pixel_values") if name in values]
    if len(kinds) != 1:
        known = [name for name in ("text", "input_ids", "image", "pixel_values") if _takes(info, name)]
        raise invalid(f"give exactly one of the inputs {' and '.join(map(repr, known))}", param=known[0])
    kind = kinds[0]
    if kind != "input_ids" and "attention_mask" in values:
        raise invalid(f"'attention_mask' belongs to 'input_ids', not to {kind!r}", param="attention_mask")
    match kind:
        case "input_ids":
            return {"token_ids": _token_ids(values["input_ids"], values.get("attention_mask"))}
        case "pixel_values":
            return {"pixel_values": _numbers(values["pixel_values"])}
        case "image":
            return {"images": tuple(_bytes(values["image"]))}
    texts = _texts(values["text"])
    if not texts:
        raise invalid("text: expected at least one", param="text")
    for other in ("query", "target"):
        if other in values and task != "hidden":
            more = _texts(values[other])
            if len(more) == 1 and other == "query":
                more *= len(texts)
            if len(more) != len(texts):
                raise invalid(f"{other}: expected as many as text, {len(texts)}, got {len(more)}", param=other)
            return {
                "pairs": tuple(zip(more, texts, strict=True) if other == "query" else zip(texts, more, strict=True))
            }
    if task == "rerank":
        raise invalid("input 'query' is missing", param="query")
    return {"texts": texts}


def _takes(info: ModelInfo, name: str) -> bool:
    return name in [known for known, _, _ in _model_inputs(info)]


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


def _bytes(entry: Input) -> list[bytes]:
    """BYTES [n] or [n, 1]."""
    name = entry.name
    if not isinstance(entry.value, list):
        raise invalid(f"{name}: expected datatype BYTES, got {entry.datatype}", param=name)
    if len(entry.shape) != 1 and not (len(entry.shape) == 2 and entry.shape[1] == 1):
        raise invalid(f"{name}: expected shape [n] or [n, 1], got {list(entry.shape)}", param=name)
    return entry.value


def _texts(entry: Input) -> tuple[str, ...]:
    """UTF-8."""
    try:
        return tuple(text.decode() for text in _bytes(entry))
    except UnicodeDecodeError as error:
        raise invalid(f"{entry.name}: an element is not valid UTF-8", param=entry.name) from error


def _token_ids(entry: Input, mask: Input | None) -> tuple[tuple[int, ...], ...]:
    """INT64 [n, L], cut to the ids that `attention_mask` marks: padding never reaches the model."""
    ids = _numbers(entry)
    if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 2:
        raise invalid(f"input_ids: expected INT64 [n, L], got {entry.datatype} {list(entry.shape)}", param="input_ids")
    if not len(ids) or ids.numel() > MAX_IDS:
        raise invalid(f"input_ids: expected 1 to {MAX_IDS} ids, got {ids.numel()}", param="input_ids")
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
