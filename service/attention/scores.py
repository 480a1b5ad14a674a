"""Scores of a block of rows against a block of keys, and their softmax; what all eager variants share.

Scores are in bits: natural ones times log2(e), so that softmax is 2^x, which the CPU computes twice as fast as e^x.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from service.attention.masks import Bounds
from service.attention.output import Scoring

LOG2_E = 1.4426950408889634


def grouped(heads_first: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[B, Hq, n, x] @ [B, Hkv, x, m] -> [B, Hq, n, m]; each key head serves Hq / Hkv query heads."""
    batch, heads, rows, inner = heads_first.shape
    kv_heads = matrix.shape[1]
    folded = heads_first.reshape(batch, kv_heads, heads // kv_heads * rows, inner)
    return torch.matmul(folded, matrix).view(batch, heads, rows, matrix.shape[-1])


def has_units(tensor: torch.Tensor) -> bool:
    """The processor multiplies this bfloat16 tensor faster than a float32 copy of it."""
    if tensor.dtype != torch.bfloat16:
        return False
    return tensor.is_cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights [B, Hq, n, m] @ value [B, Hkv, m, Dv] -> [B, Hq, n, Dv] in the weights' dtype."""
    if has_units(value):
        return grouped(weights.to(value.dtype), value).to(weights.dtype)
    return grouped(weights, value.to(weights.dtype))


def block_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scoring: Scoring,
    bias: torch.Tensor | None = None,
    bounds: Bounds | None = None,
    k_start: int = 0,
    *,
    use_units: bool = False,
) -> torch.Tensor:
    """query [B, Hq, n, D], key [B, Hkv, m, D] -> [B, Hq, n, m] bits, float32 (float64 kept), -inf where not visible.

    `bounds` (lo, hi), broadcastable to [B, Hq, n], are absolute; the first key stands at `k_start`.
    """
    scale = scoring.scale_for(query.shape[3])
    if use_units and has_units(query):  # rounded to bfloat16 once, like the scores of naive attention
        scores = grouped(query, key.transpose(-1, -2)).float().mul_(scale * LOG2_E)
    else:
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = grouped(query.to(dtype) * (scale * LOG2_E), key.to(dtype).transpose(-1, -2))
    cap(scores, scoring.softcap)
    if bias is not None:
        scores.add_(bias, alpha=LOG2_E)
    if bounds is not None:
        # compared as int32: twice as many a step as int64
        columns = torch.arange(k_start, k_start + key.shape[2], dtype=torch.int32, device=key.device)
        lo, hi = (bound.int() for bound in bounds)
        hidden = columns >= hi[..., None]
        if bool((lo > k_start).any()):
            hidden |= columns < lo[..., None]
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def cap(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """c * tanh(score / c), in place; the cap is given in nats, the scores are in bits."""
    return scores if softcap is None else scores.div_(softcap * LOG2_E).tanh_().mul_(softcap * LOG2_E)


def exponentiate(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., n, m] -> (2^(scores - top) in place, its sum [..., n], top [..., n]); empty rows give zeros, top 0."""
    top = scores.amax(-1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = scores.sub_(top[..., None]).exp2_()
    return weights, weights.sum(-1), top


def lse_of(total: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Natural log of sum(exp(scores)) from what `exponentiate` gave; -inf for empty rows."""
    return (total.log2() + top) / LOG2_E


def normalise(weights: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """weights [..., n, x] / total [..., n]; rows without keys stay zero."""
    return weights / total.masked_fill(total == 0, 1.0)[..., None]


def fitting(cpu_bytes: int, numbers: int, device: torch.device) -> int:
    """How many items of so many float32 numbers make a tile, at least one. Tiles fit a CPU's cache; a GPU wants few
    launches instead, and gets tiles 64 times as large (not measured)."""
    tile_bytes = cpu_bytes * 64 if device.type == "cuda" else cpu_bytes
    return max(1, tile_bytes // (4 * max(1, numbers)))


@dataclass(frozen=True, slots=True)
class Scratch:
    """Float32 buffers that are used again: fresh pages of a large tensor cost as much as a pass over it."""

    device: torch.device
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised, and overwritten by the next `take` of the same name."""
        numbers = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < numbers:
            self._buffers[name] = torch.empty(numbers, device=self.device)
        return self._buffers[name][:numbers].view(shape)

    def float32(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A copy of rows in a buffer of that name."""
        return self.take(name, *rows.shape).copy_(rows)
