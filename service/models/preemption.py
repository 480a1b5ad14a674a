"""Long passes in slices: layers that treat each token alone stop between its rows, as attention between its blocks.

A model's linear layers and activations are wrapped once, when it is loaded.
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

Forward = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: Any = tuple({one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values()})


def install(module: nn.Module) -> None:
    """Make the passes of `module` call the checkpoint of their context; answers stay what they are."""
    for one in module.modules():
        sliced: Forward | None = None
        if isinstance(one, nn.Linear):
            sliced = partial(_linear, one.forward, one.weight.shape[0], one.weight.numel())
        elif isinstance(one, Conv1D):  # GPT-2's, with its weight the other way round
            sliced = partial(_linear, one.forward, one.weight.shape[1], one.weight.numel())
        elif isinstance(one, ACTIVATIONS):
            sliced = partial(_activation, one.forward)
        if sliced is not None:
            one.forward = sliced


def _linear(forward: Forward, width: int, weights: int, input: torch.Tensor) -> torch.Tensor:
    return _by_rows(forward, input, width, max(1, int(slice_flops(input.device) / (2 * weights))))


def _activation(forward: Forward, input: torch.Tensor) -> torch.Tensor:
    return _by_rows(forward, input, input.shape[-1], max(1, SLICE_ELEMENTS // input.shape[-1]))


def _by_rows(forward: Forward, input: torch.Tensor, width: int, most: int) -> torch.Tensor:
    """input [..., in] -> [..., width], at most `most` rows at a time."""
    checkpoint = hook.checkpoint()
    if checkpoint is None:
        return forward(input)
    checkpoint()
    rows = input.reshape(-1, input.shape[-1])
    if len(rows) <= most:
        return forward(input)
    out: torch.Tensor | None = None
    for start in range(0, len(rows), most):
        part = forward(rows[start : start + most])
        if out is None:
            out = part.new_empty(len(rows), width)
        out[start : start + most] = part
        checkpoint()
    assert out is not None, "bug: no rows"
    return out.reshape(*input.shape[:-1], width)
