"""The Open Inference Protocol (KServe v2) without a transport: what its requests mean, and what answers carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from service.api.open_inference.metadata import ATTENTION_INPUTS, find_model, model_inputs, model_outputs, takes
from service.api.open_inference.parameters import TASK_OPTIONS, parse_options
from service.api.open_inference.tensors import Value
from service.attention.validate import check_attention
from service.core.answer import Answer
from service.core.model_info import ModelInfo
from service.core.options import (
    AttentionOptions,
    Returned,
    Task,
)
from service.core.request import AttentionRequest, ForwardRequest, Request
from service.errors import invalid

_RETURNED: dict[str, Returned] = {
    "output": "output",
    "lse": "lse",
    "weights": "weights",
    "top_weights": "top_weights",
    "top_indices": "top_weights",
}
_HIDDEN = ("hidden_states", "lengths")
MAX_IDS = 4 * 1024**2  # of one request: each becomes a Python integer


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


# models and metadata


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
    values = _inputs(infer, allowed=[name for name, _, _ in ATTENTION_INPUTS])
    for name in ("query", "key", "value"):
        if name not in values:
            raise invalid(f"input {name!r} is missing", param=name)
    given = {name: _numbers(entry) for name, entry in values.items()}
    options = parse_options(AttentionOptions, infer.parameters, timeout_s)
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
    values = _inputs(infer, allowed=[name for name, _, _ in model_inputs(info)])
    _check_outputs(infer, [name for name, _, _ in model_outputs(info)])
    asked = [name in _HIDDEN for name in infer.outputs]
    if any(asked) and not all(asked):
        raise invalid(f"outputs: {' and '.join(_HIDDEN)} come without the model's other outputs", param="outputs")
    task: Task = "hidden" if any(asked) or "layer" in infer.parameters else info.task
    options = parse_options(TASK_OPTIONS[task], infer.parameters, timeout_s)
    given = _given(values, info, task)
    return ForwardRequest(request_id, info.name, task, options, tenant=tenant, **given)


def _given(values: Mapping[str, Input], info: ModelInfo, task: Task) -> dict[str, Any]:
    """The inputs as `ForwardRequest` names them; exactly one kind of them."""
    kinds = [name for name in ("text", "input_ids", "image", "pixel_values") if name in values]
    if len(kinds) != 1:
        known = [name for name in ("text", "input_ids", "image", "pixel_values") if takes(info, name)]
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


# answer


def outputs(answer: Answer, request: Request) -> dict[str, torch.Tensor]:
    """The tensors to send, by name; without the batch axis where the request came without it."""
    if isinstance(request, ForwardRequest):
        return dict(answer.tensors)
    wanted = {name: tensor for name, tensor in answer.tensors.items() if _RETURNED[name] in request.options.returns}
    if request.rank == 3:
        return {name: one[0] for name, one in wanted.items()}
    return wanted
