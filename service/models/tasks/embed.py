"""Embeddings: hidden states pooled to one vector per sequence, which then passes through the model's own last steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from service.models.heads import last_of, lengths_of, owners_of, sum_of

PoolMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


class Normalize(nn.Module):
    """vectors [S, D] -> [S, D] of length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """vectors [S, D] -> [S, E]: a linear layer and an activation, with a residual connection if there is one."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(vectors))
        return out if self.residual is None else out + self.residual(vectors)


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the hidden states of a sequence become one vector, as sentence-transformers' modules do it."""

    modes: tuple[PoolMode, ...] = ("mean",)  # more than one: their vectors side by side
    steps: tuple[nn.Module, ...] = ()  # what follows: Dense, LayerNorm, Normalize, in float32
    includes_prompt: bool = True  # False: tokens of the prompt are left out of the vector

    @property
    def is_normalized(self) -> bool:
        return bool(self.steps) and isinstance(self.steps[-1], Normalize)


def pool(
    states: torch.Tensor,
    bounds: torch.Tensor,
    pooling: Pooling,
    *,
    prompts: torch.Tensor | None = None,
    dimensions: int | None = None,
) -> torch.Tensor:
    """states [T, H] of S sequences -> their embeddings [S, D] float32.

    Args:
        states: hidden states, sequence after sequence.
        bounds: [S + 1]: sequence i is states[bounds[i]:bounds[i + 1]].
        pooling: the model's.
        prompts: [S] tokens at the beginning of each sequence that are its prompt; None: no sequence has one.
        dimensions: embeddings are cut to so many numbers, and then normalized.
    """
    states = states.float()
    if prompts is None or pooling.includes_prompt:
        prompts = torch.zeros_like(bounds[1:])
    vectors = torch.cat([_POOLS[mode](states, bounds, prompts) for mode in pooling.modes], dim=1)
    for step in pooling.steps:
        vectors = step(vectors)
    return vectors if dimensions is None else nn.functional.normalize(vectors[:, :dimensions], dim=-1)


def merge_chunks(
    vectors: torch.Tensor, tokens: Sequence[int], counts: Sequence[int], *, is_normalized: bool
) -> torch.Tensor:
    """vectors [rows, D] -> [inputs, D]: for each input the mean of its chunks, weighted by their tokens.

    Args:
        vectors: one vector for each row, float32.
        tokens: of each row.
        counts: rows of each input.
        is_normalized: the mean is normalized again.

    Returns:
        One vector for each input; that of an input of one row is unchanged.
    """
    weights = torch.tensor(tokens, dtype=vectors.dtype)[:, None]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sums = vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, owner, vectors * weights)
    merged = sums / weights.new_zeros(len(counts), 1).index_add_(0, owner, weights)
    if is_normalized:
        merged = nn.functional.normalize(merged, dim=-1)
    is_single = torch.tensor(counts)[:, None] == 1
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return torch.where(is_single, vectors[first], merged)  # a single chunk must not be rounded again


# -- states [T, H], bounds [S + 1], prompts [S] -> [S, H] ---------------------------------------------------------


def _cls(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The first token that is not of the prompt; of nothing but a prompt its first."""
    return states[bounds[:-1] + torch.where(lengths_of(bounds) > prompts, prompts, 0)]


def _last(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    return last_of(states, bounds)


def _positions(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[T]: of each token in its sequence."""
    return torch.arange(len(states), device=states.device) - bounds[:-1][owners_of(bounds)]


def _weighted(states: torch.Tensor, bounds: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums of states * weights, sums of weights), both by sequence."""
    return sum_of(states * weights[:, None], bounds), sum_of(weights[:, None], bounds).clamp(min=1e-9)


def _kept(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """[T] float32: 1 for tokens that are pooled, 0 for those of the prompt."""
    return (_positions(states, bounds) >= prompts[owners_of(bounds)]).to(states.dtype)


def _mean(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    sums, counts = _weighted(states, bounds, _kept(states, bounds, prompts))
    return sums / counts


def _mean_sqrt(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    sums, counts = _weighted(states, bounds, _kept(states, bounds, prompts))
    return sums / counts.sqrt()


def _weighted_mean(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Each token weighs as much as its position, counted from 1, prompt included."""
    weights = (_positions(states, bounds) + 1).to(states.dtype) * _kept(states, bounds, prompts)
    sums, totals = _weighted(states, bounds, weights)
    return sums / totals


def _max(states: torch.Tensor, bounds: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    hidden = states.masked_fill(_kept(states, bounds, prompts)[:, None] == 0, -torch.inf)
    owners = owners_of(bounds)[:, None].expand_as(hidden)
    out = torch.full((len(bounds) - 1, states.shape[1]), -torch.inf, device=states.device)
    return out.scatter_reduce_(0, owners, hidden, reduce="amax")


_POOLS: dict[PoolMode, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
