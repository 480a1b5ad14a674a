"""Models of the Open Inference Protocol, and the names, datatypes and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from service.core.model_info import ModelInfo
from service.errors import FarsightError, Kind

ATTENTION = "attention"  # the model that is attention itself
MODEL_VERSION = "1"

_FLOATS = "FP32"  # metadata names one datatype for each tensor; FP16 and BF16 are accepted as well

# name, datatype, rank with the batch axis
_ATTENTION_INPUTS = (("query", _FLOATS, 4), ("key", _FLOATS, 4), ("value", _FLOATS, 4), ("attn_mask", "BOOL", 4))
_ATTENTION_OUTPUTS = (
    ("output", _FLOATS, 4),
    ("lse", _FLOATS, 3),
    ("weights", _FLOATS, 4),
    ("top_weights", _FLOATS, 4),
    ("top_indices", "INT64", 4),
    ("block_map", "UINT8", 4),
)
_IDS = (("input_ids", "INT64", 2), ("attention_mask", "INT64", 2), ("token_type_ids", "INT64", 2))
_RERANK_INPUTS = (("query", "BYTES", 1), ("text", "BYTES", 1), *_IDS)
_MODEL_INPUTS = {  # by `ModelInfo.inputs`
    "text": (("text", "BYTES", 1), *_IDS),
    "source and target": (("text", "BYTES", 1), ("target", "BYTES", 1), *_IDS),
    "image": (("image", "BYTES", 1), ("pixel_values", "FP32", 4)),
    "audio": (("audio", "BYTES", 1), ("input_features", "FP32", 3)),
}


def find_model(name: str, model_version: str, infos: Sequence[ModelInfo]) -> ModelInfo | None:
    """The model called `name`; None for `attention`. Raises NOT_FOUND, naming the served models or the version."""
    by_name = {info.name: info for info in infos}
    if name != ATTENTION and name not in by_name:
        known = ", ".join([ATTENTION, *by_name])
        raise FarsightError(
            Kind.NOT_FOUND, f"model {name[:96]!r} is not served; expected one of {known}", param="model"
        )
    if model_version not in ("", MODEL_VERSION):
        raise FarsightError(
            Kind.NOT_FOUND, f"model {name!r}: expected version {MODEL_VERSION!r}, got {model_version[:96]!r}"
        )
    return by_name.get(name)


def server_metadata() -> dict[str, Any]:
    """The document of `GET /v2`."""
    try:
        farsight = version("farsight")
    except PackageNotFoundError:  # run from a source tree
        farsight = "unknown"
    return {"name": "farsight", "version": farsight, "extensions": ["binary_tensor_data"]}


def model_metadata(name: str, model_version: str, infos: Sequence[ModelInfo]) -> dict[str, Any]:
    """The document of `GET /v2/models/{name}`. Raises NOT_FOUND."""
    info = find_model(name, model_version, infos)
    outputs = _described(_ATTENTION_OUTPUTS) if info is None else _model_outputs(info)
    return {
        "name": name,
        "versions": [MODEL_VERSION],
        "platform": "farsight_torch",
        "inputs": _described(_inputs(info)),
        "outputs": outputs,
    }


def input_names(info: ModelInfo | None) -> list[str]:
    """Inputs that a model accepts; None: those of attention."""
    return [name for name, _, _ in _inputs(info)]


def output_names(info: ModelInfo | None) -> list[str]:
    """Outputs that a model can return; None: those of attention."""
    outputs = _described(_ATTENTION_OUTPUTS) if info is None else _model_outputs(info)
    return [output["name"] for output in outputs]


def _inputs(info: ModelInfo | None) -> tuple[tuple[str, str, int], ...]:
    if info is None:
        return _ATTENTION_INPUTS
    return _RERANK_INPUTS if info.task == "rerank" else _MODEL_INPUTS[info.inputs]


def _model_outputs(info: ModelInfo) -> list[dict[str, Any]]:
    """The outputs of the model's task, then the hidden states of all tokens and the length of each input."""
    outputs: list[tuple[str, str, list[int]]] = []
    match info.task:
        case "embed":
            outputs = [("embedding", _FLOATS, [-1, info.dimensions])]
        case "classify" | "rerank":
            outputs = [("scores", _FLOATS, [-1, len(info.labels)])]
        case "score":
            outputs = [("logprob_sum", _FLOATS, [-1]), ("scored_tokens", "INT64", [-1])]
    outputs += [("hidden_states", _FLOATS, [-1, info.state_dimensions]), ("lengths", "INT64", [-1])]
    return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in outputs]


def _described(rows: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": datatype, "shape": [-1] * rank} for name, datatype, rank in rows]
