"""Named input tensors of an infer request, and what they mean to a forward pass: texts, pairs, ids, images, audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from service.api.open_inference.tensors import Value
from service.core.options import Task
from service.errors import invalid

MAX_IDS = 4 * 1024**2  # token ids of one request: each becomes a Python integer
_BESIDE_IDS = ("attention_mask", "token_type_ids")
_KINDS = ("text", "input_ids", "image", "pixel_values", "audio", "input_features")


@dataclass(frozen=True, slots=True)
class InferInput:
    """One named input; `value` is a list of strings if `datatype` is BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    value: Value


def by_name(inputs: Sequence[InferInput], known: Sequence[str], model: str) -> dict[str, InferInput]:
    """`inputs` by their names. Raises INVALID if a name is given twice or is not one of `known`."""
    named: dict[str, InferInput] = {}
    for entry in inputs:
        if entry.name not in known:
            name = entry.name[:96]
            raise invalid(f"unknown input {name!r} of {model!r}; expected one of {', '.join(known)}", param=name)
        if entry.name in named:
            raise invalid(f"input {entry.name!r} is given twice", param=entry.name)
        named[entry.name] = entry
    return named


def numbers(entry: InferInput) -> torch.Tensor:
    """The tensor of an input. Raises INVALID if it holds BYTES."""
    if isinstance(entry.value, list):
        raise invalid(f"{entry.name}: expected a datatype of numbers, got BYTES", param=entry.name)
    return entry.value


def forward_inputs(named: Mapping[str, InferInput], known: Sequence[str], task: Task) -> dict[str, Any]:
    """Inputs of a forward pass under the field names of `ForwardRequest`.

    text: BYTES [n] or [n, 1], with `query` or `target` pairs of texts; input_ids: INT64 [n, L], cut to the ids that
    attention_mask [n, L] marks, with their token_type_ids [n, L]; image and audio: BYTES [n] or [n, 1]; pixel_values:
    FP32 [n, C, H, W]; input_features: FP32 [n, mel bands, frames]. `known` are the names that the model accepts.
    Raises INVALID unless exactly one of these kinds is given.
    """
    kinds = [name for name in _KINDS if name in named]
    if len(kinds) != 1:
        accepted = [name for name in _KINDS if name in known]
        got = " and ".join(map(repr, kinds)) or "none"
        raise invalid(
            f"inputs: expected exactly one of {' and '.join(map(repr, accepted))}, got {got}", param=accepted[0]
        )
    kind = kinds[0]
    for beside in _BESIDE_IDS:
        if kind != "input_ids" and beside in named:
            raise invalid(f"{beside}: belongs to 'input_ids', got {kind!r}", param=beside)
    match kind:
        case "input_ids":
            return _id_inputs(named["input_ids"], *(named.get(beside) for beside in _BESIDE_IDS))
        case "pixel_values" | "input_features":
            return {"features": numbers(named[kind])}
        case "image":
            return {"images": tuple(_strings(named["image"]))}
        case "audio":
            return {"audio": tuple(_strings(named["audio"]))}
    return _text_inputs(named, task)


def _text_inputs(named: Mapping[str, InferInput], task: Task) -> dict[str, Any]:
    """Texts, or pairs of (query, text) or (text, target). One query may go with all texts."""
    texts = _texts(named["text"])
    if not texts:
        raise invalid("text: expected at least one", param="text")
    if task == "hidden":
        return {"texts": texts}
    if "query" in named:
        queries = _texts(named["query"])
        if len(queries) == 1:
            queries *= len(texts)
        _check_as_many("query", queries, texts)
        return {"pairs": tuple(zip(queries, texts, strict=True))}
    if "target" in named:
        targets = _texts(named["target"])
        _check_as_many("target", targets, texts)
        return {"pairs": tuple(zip(texts, targets, strict=True))}
    if task == "rerank":
        raise invalid("input 'query' is missing", param="query")
    return {"texts": texts}


def _check_as_many(name: str, others: Sequence[str], texts: Sequence[str]) -> None:
    if len(others) != len(texts):
        raise invalid(f"{name}: expected as many as text, {len(texts)}, got {len(others)}", param=name)


def _strings(entry: InferInput) -> list[bytes]:
    """BYTES [n] or [n, 1]."""
    name = entry.name
    if not isinstance(entry.value, list):
        raise invalid(f"{name}: expected datatype BYTES, got {entry.datatype}", param=name)
    if len(entry.shape) != 1 and not (len(entry.shape) == 2 and entry.shape[1] == 1):
        raise invalid(f"{name}: expected shape [n] or [n, 1], got {list(entry.shape)}", param=name)
    return entry.value


def _texts(entry: InferInput) -> tuple[str, ...]:
    """BYTES [n] or [n, 1] of UTF-8."""
    try:
        return tuple(text.decode() for text in _strings(entry))
    except UnicodeDecodeError as error:
        raise invalid(f"{entry.name}: an element is not valid UTF-8", param=entry.name) from error


def _id_inputs(entry: InferInput, mask: InferInput | None, types: InferInput | None) -> dict[str, Any]:
    """Token ids, and their types if there are any: INT64 [n, L], cut to what `mask` marks, so that padding never
    reaches the model."""
    ids = _integers(entry)
    if not len(ids) or ids.numel() > MAX_IDS:
        raise invalid(f"input_ids: expected 1 to {MAX_IDS} ids, got {ids.numel()}", param="input_ids")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else _padding_mask(mask, ids)
    if not bool(valid.any(dim=1).all()):
        raise invalid("input_ids: expected at least one valid id in each row", param="input_ids")
    found = {"token_ids": _kept(ids, valid)}
    if types is not None:
        if types.shape != entry.shape:
            message = f"token_type_ids: expected {list(entry.shape)}, as input_ids, got {list(types.shape)}"
            raise invalid(message, param="token_type_ids")
        found["token_types"] = _kept(_integers(types), valid)
    return found


def _integers(entry: InferInput) -> torch.Tensor:
    """INT64 [n, L]."""
    found = numbers(entry)
    if found.dtype not in (torch.int32, torch.int64) or found.ndim != 2:
        message = f"{entry.name}: expected INT64 [n, L], got {entry.datatype} {list(entry.shape)}"
        raise invalid(message, param=entry.name)
    return found


def _kept(rows: torch.Tensor, valid: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row[keep].tolist()) for row, keep in zip(rows, valid, strict=True))


def _padding_mask(entry: InferInput, ids: torch.Tensor) -> torch.Tensor:
    """ids [n, L] -> bool [n, L], True for valid ids: one run at the left or the right of each row."""
    mask = numbers(entry)
    if mask.shape != ids.shape or mask.is_floating_point():
        raise invalid(
            f"attention_mask: expected INT64 or BOOL {list(ids.shape)}, got {entry.datatype} {list(entry.shape)}",
            param="attention_mask",
        )
    steps = mask.to(torch.int64).diff(dim=1)
    binary = bool(((mask == 0) | (mask == 1)).all())
    if not binary or not bool(((steps <= 0).all(dim=1) | (steps >= 0).all(dim=1)).all()):
        raise invalid(
            "attention_mask: expected each row to be ones and then zeros, or zeros and then ones",
            param="attention_mask",
        )
    return mask.bool()
