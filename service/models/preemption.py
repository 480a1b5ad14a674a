"""Checkpoints inside long forward passes: layers that treat each token alone run a block of rows at a time.

Attention has checkpoints between its own blocks. Linear layers and activations are wrapped here, once at load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from service.attention.output import slice_flops
from service.models import hook

# of an activation: a few passes over new memory, at the ~2 GB/s of pages that are touched for the first time
SLICE_ELEMENTS = 8_000_000

ACTIVATIONS: Any = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})

_Forward = Callable[[torch.Tensor], torch.Tensor]


def install_checkpoints(module: nn.Module) -> None:
    """Make the layers of `module` call the checkpoint of the pass they run in. Their results stay the same."""
    for layer in module.modules():
        sliced: _Forward | None = None
        if isinstance(layer, nn.Linear):
            sliced = partial(_linear, layer.forward, layer.weight.shape[0], layer.weight.numel())
        elif isinstance(layer, Conv1D):  # GPT-2's linear layer, its weight transposed
            sliced = partial(_linear, layer.forward, layer.weight.shape[1], layer.weight.numel())
        elif isinstance(layer, ACTIVATIONS):
            sliced = partial(_activation, layer.forward)
        if sliced is not None:
            layer.forward = sliced


def _linear(forward: _Forward, width: int, weights: int, input: torch.Tensor) -> torch.Tensor:
    return _by_rows(forward, input, width, max(1, int(slice_flops(input.device) / (2 * weights))))


def _activation(forward: _Forward, input: torch.Tensor) -> torch.Tensor:
    return _by_rows(forward, input, input.shape[-1], max(1, SLICE_ELEMENTS // input.shape[-1]))


def _by_rows(forward: _Forward, input: torch.Tensor, width: int, max_rows: int) -> torch.Tensor:
    """input [..., in] -> [..., width], at most `max_rows` rows at a time."""
    checkpoint = hook.checkpoint()
    if checkpoint is None:
        return forward(input)
    checkpoint()
    rows = input.reshape(-1, input.shape[-1])
    if len(rows) <= max_rows:
        return forward(input)
    out: torch.Tensor | None = None
    for start in range(0, len(rows), max_rows):
        part = forward(rows[start : start + max_rows])
        if out is None:
            out = part.new_empty(len(rows), width)
        out[start : start + max_rows] = part
        checkpoint()
    assert out is not None, "bug: no rows"
    return out.reshape(*input.shape[:-1], width)
