"""Rotary positions beyond a model's own length, and frequencies that depend on the length of a pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import PretrainedConfig

# kinds whose max_position_embeddings already counts the scaling
SCALED_LENGTH = ("default", "longrope", "su", "llama3", "proportional")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies change with the longest sequence of a pass


def scale_rope(model: str, hf_config: PretrainedConfig, rope_scaling: dict[str, Any]) -> None:
    """Set the rotary scaling of `hf_config`, and the positions that it then has. Raises ValueError if it cannot."""
    given = dict(rope_scaling)
    if "type" in given:  # as older files spell it
        given["rope_type"] = given.pop("type")
    if "rope_type" not in given:
        raise ValueError(f"model {model!r}: rope_scaling needs a rope_type (linear, dynamic, yarn, ...)")
    present = getattr(hf_config, "rope_parameters", None)
    if not isinstance(present, dict) or "rope_theta" not in present:
        raise ValueError(f"model {model!r}: rope_scaling: {hf_config.model_type} has no rotary positions")
    scaling = {"original_max_position_embeddings": hf_config.max_position_embeddings, **given}
    hf_config.rope_parameters = {**present, **scaling}
    # dynamic frequencies grow once a sequence is over the model's own length, so that length must stay as it is
    if "factor" in scaling and scaling["rope_type"] != "dynamic":
        hf_config.max_position_embeddings = int(scaling["original_max_position_embeddings"] * scaling["factor"])


def scaled_length(hf_config: PretrainedConfig) -> int | None:
    """Positions that rotary scaling reaches; those of the configuration if nothing is scaled; None: no limit.

    Files may give a scaling without counting it in max_position_embeddings, as Qwen's documentation tells its users to.
    """
    count: int | None = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if count is None or count < 0:
        return None
    if "factor" not in rope or rope.get("rope_type") in SCALED_LENGTH:
        return count
    original = rope.get("original_max_position_embeddings")
    if original is None and rope.get("rope_type") == "linear":  # by custom its files state the scaled length
        return count
    return max(count, int((original or count) * rope["factor"]))


def may_pack(hf_config: PretrainedConfig, base: nn.Module) -> bool:
    """Whether packing may be tried: `base` accepts position ids, and no sequence changes another one's frequencies."""
    if hf_config.is_encoder_decoder or "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    return not any(rope_type in LENGTH_DEPENDENT_ROPE for rope_type in _rope_types(hf_config))


def rope_resets(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Functions that restore the rotary frequencies of `module` as loaded.

    Transformers leaves dynamic frequencies as the longest sequence so far has set them: the answer to one request
    would depend on the requests before it.
    """
    for layer in module.modules():
        if hasattr(layer, "max_seq_len_cached") and hasattr(layer, "original_max_seq_len"):
            names = [name for name in dir(layer) if name.endswith("original_inv_freq")]
            yield partial(_reset, layer, names)


def _rope_types(hf_config: PretrainedConfig) -> list[str]:
    """Of the whole model, or of each kind of layer that has its own."""
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    groups = [parameters, *(group for group in parameters.values() if isinstance(group, dict))]
    return [str(group["rope_type"]) for group in groups if "rope_type" in group]


def _reset(layer: nn.Module, names: list[str]) -> None:
    for name in names:
        prefix = name.removesuffix("original_inv_freq")
        current = getattr(layer, f"{prefix}inv_freq")
        setattr(layer, f"{prefix}inv_freq", getattr(layer, name).to(current.device).clone())
        if hasattr(layer, f"{prefix}max_seq_len_cached"):
            setattr(layer, f"{prefix}max_seq_len_cached", layer.original_max_seq_len)
    layer.max_seq_len_cached = layer.original_max_seq_len
