"""Embeddings: hidden states pooled to one vector per sequence, as the sentence-transformers files of the model say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from service.models.packing import Packed


@dataclass(frozen=True, slots=True)
class Pooling:
    """How one vector is made of a sequence's hidden states."""

    mode: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = False


def read_pooling(directory: Path) -> Pooling:
    """From modules.json and its Pooling folder; a model without them is mean-pooled and normalised."""
    modules_file = directory / "modules.json"
    if not modules_file.is_file():
        return Pooling("mean", normalize=True)
    modules = json.loads(modules_file.read_text())
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ValueError(f"{modules_file}: modules {sorted(unknown)} are not served")
    settings = json.loads((directory / kinds["Pooling"] / "config.json").read_text())
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    chosen = [mode for mode, name in modes.items() if settings.get(name)]
    wanted = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or len(wanted) != 1:
        raise ValueError(f"{directory}: pooling {wanted} is not served; one of {sorted(modes)} is")
    mode: Literal["mean", "cls", "last"] = chosen[0]  # type: ignore[assignment]
    return Pooling(mode, normalize="Normalize" in kinds)


def pool(hidden: torch.Tensor, packed: Packed, pooling: Pooling, dimensions: int | None = None) -> torch.Tensor:
    """hidden [1, T, H] -> [S, H or dimensions] float32; cut to `dimensions` before it is normalised."""
    states = hidden[0].float()
    bounds = torch.tensor(packed.cu_seqlens, device=states.device)
    match pooling.mode:
        case "mean":
            lengths = bounds.diff()
            sums = states.new_zeros(len(lengths), states.shape[1])
            vectors = sums.index_add_(0, packed.segment_ids[0], states) / lengths[:, None]
        case "cls":
            vectors = states[bounds[:-1]]
        case "last":
            vectors = states[bounds[1:] - 1]
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalize else vectors
