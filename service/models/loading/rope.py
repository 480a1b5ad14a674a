"""Rotary positions: what may be packed, and frequencies that must not carry over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from transformers import (
    PretrainedConfig,
)

STEPWISE_ROPE = ("dynamic", "longrope")  # frequencies that change with the longest sequence of a pass


def may_pack(hf: PretrainedConfig, base: nn.Module) -> bool:
    """Position ids can be given, and a pass's frequencies do not depend on its longest sequence."""
    stepwise = any(rope in STEPWISE_ROPE for rope in _rope_types(hf))
    return "position_ids" in inspect.signature(base.forward).parameters and not stepwise and not hf.is_encoder_decoder


def _rope_types(hf: PretrainedConfig) -> list[str]:
    parameters = getattr(hf, "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return [str(one["rope_type"]) for one in kinds if "rope_type" in one]


def rope_resets(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Transformers' dynamic frequencies stay where the longest sequence so far has put them: the answer to one request
    would depend on the requests before it."""
    for one in module.modules():
        if hasattr(one, "max_seq_len_cached") and hasattr(one, "original_max_seq_len"):
            names = [name for name in dir(one) if name.endswith("original_inv_freq")]
            yield partial(_reset_rope, one, names)


def _reset_rope(module: nn.Module, names: list[str]) -> None:
    for name in names:
        prefix = name.removesuffix("original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, name).to(current.device).clone())
        if hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    module.max_seq_len_cached = module.original_max_seq_len
