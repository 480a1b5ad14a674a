"""Rotary frequencies that depend on the length of a pass: such models are not packed, and are reset between passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from transformers import PretrainedConfig

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies change with the longest sequence of a pass


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
