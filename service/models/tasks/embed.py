"""Embeddings: hidden states pooled to one vector per sequence, as the sentence-transformers files of the model say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from service.models.heads import first_of, last_of, mean_of

POOLS = {"mean": mean_of, "cls": first_of, "last": last_of}


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
    if settings.get("pooling_mode") in POOLS:  # as sentence-transformers 6 writes it
        return Pooling(settings["pooling_mode"], normalize="Normalize" in kinds)
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    chosen = [mode for mode, name in modes.items() if settings.get(name)]
    wanted = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or len(wanted) != 1:
        raise ValueError(f"{directory}: pooling {wanted} is not served; one of {sorted(modes)} is")
    mode: Literal["mean", "cls", "last"] = chosen[0]  # type: ignore[assignment]
    return Pooling(mode, normalize="Normalize" in kinds)


def pool(states: torch.Tensor, bounds: torch.Tensor, pooling: Pooling, dimensions: int | None = None) -> torch.Tensor:
    """states [T, H] of S sequences -> [S, H or dimensions] float32; cut to `dimensions` before it is normalised."""
    vectors = POOLS[pooling.mode](states.float(), bounds)
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalize else vectors


def merge_chunks(vectors: torch.Tensor, tokens: Sequence[int], counts: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """vectors [rows, D] -> [inputs, D]: the mean of an input's chunks, weighted by their tokens."""
    weights = torch.tensor(tokens, dtype=vectors.dtype)[:, None]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sums = vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, owner, vectors * weights)
    merged = sums / weights.new_zeros(len(counts), 1).index_add_(0, owner, weights)
    alone = torch.tensor(counts)[:, None] == 1
    if pooling.normalize:
        merged = torch.nn.functional.normalize(merged, dim=-1)
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return torch.where(alone, vectors[first], merged)  # what is one chunk is not rounded again
