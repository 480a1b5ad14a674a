"""Embeddings: hidden states pooled to one vector per sequence, as the model's sentence-transformers files say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from service.models.heads import first_of, last_of, mean_of

PoolMode = Literal["mean", "cls", "last"]

_POOLS = {"mean": mean_of, "cls": first_of, "last": last_of}
_MODES: dict[str, PoolMode] = {  # settings of sentence-transformers before version 6
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the hidden states of a sequence become one vector."""

    mode: PoolMode = "mean"
    normalize: bool = False


def read_pooling(directory: Path) -> Pooling:
    """Read modules.json and the Pooling folder it names. A model without them is mean-pooled and normalized.

    Raises ValueError for modules or a pooling that are not supported.
    """
    modules_file = directory / "modules.json"
    if not modules_file.is_file():
        return Pooling("mean", normalize=True)
    modules = json.loads(modules_file.read_text())
    paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    expected = {"Transformer", "Pooling", "Normalize"}
    if unknown := set(paths) - expected:
        raise ValueError(f"{modules_file}: expected modules of {sorted(expected)}, got {sorted(unknown)}")
    settings = json.loads((directory / paths["Pooling"] / "config.json").read_text())
    normalize = "Normalize" in paths
    if settings.get("pooling_mode") in _POOLS:  # as sentence-transformers 6 writes it
        return Pooling(settings["pooling_mode"], normalize)
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ValueError(f"{directory}: pooling: expected one of {sorted(_POOLS)}, got {chosen}")
    return Pooling(_MODES[chosen[0]], normalize)


def pool(states: torch.Tensor, bounds: torch.Tensor, pooling: Pooling, dimensions: int | None = None) -> torch.Tensor:
    """states [T, H], bounds [S + 1] -> [S, dimensions or H] float32, cut to `dimensions` before it is normalized."""
    vectors = _POOLS[pooling.mode](states.float(), bounds)
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalize else vectors


def merge_chunks(vectors: torch.Tensor, tokens: Sequence[int], counts: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """vectors [rows, D] -> [inputs, D]: for each input the mean of its chunks, weighted by their tokens.

    Args:
        vectors: one vector for each row, float32.
        tokens: of each row.
        counts: rows of each input.
        pooling: whether the mean is normalized again.

    Returns:
        One vector for each input; that of an input of one row is unchanged.
    """
    weights = torch.tensor(tokens, dtype=vectors.dtype)[:, None]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sums = vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, owner, vectors * weights)
    merged = sums / weights.new_zeros(len(counts), 1).index_add_(0, owner, weights)
    if pooling.normalize:
        merged = torch.nn.functional.normalize(merged, dim=-1)
    is_single = torch.tensor(counts)[:, None] == 1
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return torch.where(is_single, vectors[first], merged)  # a single chunk must not be rounded again
