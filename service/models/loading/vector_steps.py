"""Modules of sentence-transformers after Pooling, from their folders: safetensors only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from service.models.files import read_json
from service.models.tasks.embed import Dense, Normalize

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.SiLU": nn.SiLU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.linear.Identity": nn.Identity,
}
VECTOR = "sentence_embedding"  # the library's name of what a step reads and writes


def read_step(name: str, folder: Path) -> list[nn.Module]:
    """The step of this name, in float32; [] if it computes nothing. Raises ValueError and FileNotFoundError."""
    settings = read_json(folder / "config.json")
    for side in ("module_input_name", "module_output_name"):
        if settings.pop(side, None) not in (None, VECTOR):
            raise ValueError(f"{name}: {side} is not supported; steps read and write {VECTOR}")
    return STEPS[name](settings, folder)


def _normalize(settings: dict[str, Any], folder: Path) -> list[nn.Module]:
    return [Normalize()]


def _dropout(settings: dict[str, Any], folder: Path) -> list[nn.Module]:
    return []  # only in training


def _layer_norm(settings: dict[str, Any], folder: Path) -> list[nn.Module]:
    norm = nn.LayerNorm(int(settings.pop("dimension")))
    _check_settings("LayerNorm", settings)
    norm.load_state_dict(_of("norm", _weights(folder)))
    return [norm.eval()]


def _dense(settings: dict[str, Any], folder: Path) -> list[nn.Module]:
    settings = dict(settings)
    sizes = int(settings.pop("in_features")), int(settings.pop("out_features"))
    activation = settings.pop("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"Dense: the activation {activation!r} is not one of {sorted(ACTIVATIONS)}")
    weights = _weights(folder)
    linear = nn.Linear(*sizes, bias=bool(settings.pop("bias", True)))
    linear.load_state_dict(_of("linear", weights))
    residual: nn.Module | None = None
    if settings.pop("use_residual", False):
        residual = nn.Identity()
        if sizes[0] != sizes[1]:
            residual = nn.Linear(*sizes, bias=False)
            residual.load_state_dict(_of("residual", weights))
    _check_settings("Dense", settings)
    return [Dense(linear, ACTIVATIONS[activation](), residual).eval()]


def _check_settings(name: str, left: dict[str, Any]) -> None:
    if left:
        raise ValueError(f"{name}: {sorted(left)} are not supported")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder.name}/{file.name} is missing (weights are read from safetensors only)")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def _of(part: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of one part of a module."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


STEPS: dict[str, Callable[[dict[str, Any], Path], list[nn.Module]]] = {
    "Dense": _dense,
    "Dropout": _dropout,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
}
