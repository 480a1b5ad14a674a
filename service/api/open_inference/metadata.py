"""Models of the Open Inference Protocol, and the metadata of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from service.core.model_info import ModelInfo
from service.errors import FarsightError, Kind

ATTENTION = "attention"


MODEL_VERSION = "1"


_FLOATS = "FP32"  # the metadata of a tensor names one datatype; FP16 and BF16 are taken as well


# name, datatype, rank with the batch axis
ATTENTION_INPUTS = (("query", _FLOATS, 4), ("key", _FLOATS, 4), ("value", _FLOATS, 4), ("attn_mask", "BOOL", 4))


_ATTENTION_OUTPUTS = (
    ("output", _FLOATS, 4),
    ("lse", _FLOATS, 3),
    ("weights", _FLOATS, 4),
    ("top_weights", _FLOATS, 4),
    ("top_indices", "INT64", 4),
)


_IDS = (("input_ids", "INT64", 2), ("attention_mask", "INT64", 2))


# what a model takes, by `ModelInfo.inputs`, and for reranking a query beside each text
_MODEL_INPUTS = {
    "text": (("text", "BYTES", 1), *_IDS),
    "source and target": (("text", "BYTES", 1), ("target", "BYTES", 1), *_IDS),
    "image": (("image", "BYTES", 1), ("pixel_values", "FP32", 4)),
}


_RERANK_INPUTS = (("query", "BYTES", 1), ("text", "BYTES", 1))


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
        return document | {"inputs": _described(ATTENTION_INPUTS), "outputs": _described(_ATTENTION_OUTPUTS)}
    outputs = [
        {"name": name, "datatype": datatype, "shape": list(shape)} for name, datatype, shape in model_outputs(info)
    ]
    return document | {"inputs": _described(model_inputs(info)), "outputs": outputs}


def model_inputs(info: ModelInfo) -> tuple[tuple[str, str, int], ...]:
    return (*_RERANK_INPUTS, *_IDS) if info.task == "rerank" else _MODEL_INPUTS[info.inputs]


def model_outputs(info: ModelInfo) -> list[tuple[str, str, tuple[int, ...]]]:
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


def takes(info: ModelInfo, name: str) -> bool:
    return name in [known for known, _, _ in model_inputs(info)]
