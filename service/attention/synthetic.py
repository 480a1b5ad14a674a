"""Synthetic inputs for tests, benchmarks and calibration: with the structure of long contexts, or without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from service.attention.inputs import Tensors


@dataclass(frozen=True, slots=True)
class InputShape:
    """Sizes of self-attention inputs: query [batch, heads, length, head_dim], key and value with kv_heads."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Needle:
    """One key that a few rows of every head look for; a row of two needles looks for the later one."""

    at: int
    rows: tuple[int, ...]


def diffuse(shape: InputShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """query [B, Hq, L, D], key and value [B, Hkv, L, D]: independent Gaussians.

    Not sparse: 95 % of the mass needs ~95 % of the blocks. The counter-example to `structured`.
    """
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(shape.batch, heads, shape.length, shape.head_dim, generator=draw).to(dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return query, key, value


def structured(
    shape: InputShape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    topic_tokens: int = 256,
    focus: float = 12.0,
    sinks: int = 4,
    needles: int = 4,
) -> Tensors:
    """query [B, Hq, L, D], key and value [B, Hkv, L, D] with sinks, locality, drifting topics and needles.

    A topic is a direction that turns every `topic_tokens` tokens. A query looks for its own topic (locality) and for
    an earlier one. Each needle is one key of the first half that sixteen later rows look for.

    Args:
        shape: sizes of the tensors.
        dtype: of all three.
        seed: the same seed draws the same inputs.
        topic_tokens: tokens from one topic to the next.
        focus: nats by which the score of a query's topics is above the rest.
        sinks: number of first keys that every query gives some mass.
        needles: number of planted needles.

    Returns:
        query, key and value, on the CPU.
    """
    tensors, _ = planted(shape, dtype, seed, topic_tokens=topic_tokens, focus=focus, sinks=sinks, needles=needles)
    return tensors


def planted(
    shape: InputShape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    topic_tokens: int = 256,
    focus: float = 12.0,
    sinks: int = 4,
    needles: int = 4,
) -> tuple[Tensors, tuple[Needle, ...]]:
    """query [B, Hq, L, D], key and value [B, Hkv, L, D] as of `structured`, and where the needles are."""
    batch, heads, kv_heads = shape.batch, shape.heads, shape.kv_heads
    length, head_dim = shape.length, shape.head_dim
    draw = torch.Generator().manual_seed(seed)
    strength = (focus * head_dim**0.5) ** 0.5  # |q| = |k|, so that q.k / sqrt(D) = focus on the same topic

    topics = _drift(shape, topic_tokens, draw)
    noise = torch.randn(batch, kv_heads, length, head_dim, generator=draw)
    key = strength * topics + 0.3 * noise
    value = topics * head_dim**0.5 + torch.randn(batch, kv_heads, length, head_dim, generator=draw)

    section = torch.arange(length) // (2 * topic_tokens)
    earlier = (torch.rand(int(section[-1]) + 1, generator=draw)[section] * torch.arange(length)).long()
    query = strength * (topics + 0.7 * topics[:, :, earlier]).repeat_interleave(heads // kv_heads, dim=1)
    query += 0.3 * torch.randn(batch, heads, length, head_dim, generator=draw)

    sink = normalize(torch.randn(head_dim, generator=draw), dim=0)
    query += strength * sink
    key[:, :, :sinks] = strength * sink + 0.1 * noise[:, :, :sinks]
    found: list[Needle] = []
    for at in torch.randperm(max(length // 2, 1), generator=draw)[:needles].tolist():
        # after the needle: a causal row that cannot see what it looks for attends to everything a little
        rows = at + 1 + torch.randperm(length - at - 1, generator=draw)[:16]
        found.append(Needle(int(at), tuple(rows.tolist())))
        plant_needle(query, key, value, at, found[-1].rows, seed=int(at))
    return (query.to(dtype), key.to(dtype), value.to(dtype)), tuple(found)


def plant_needle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int, rows: tuple[int, ...], *, seed: int = 0
) -> None:
    """query [B, Hq, L, D], key and value [B, Hkv, L, D], in place: `rows` look for the key at `at`.

    A row that may see the needle finds it with a score of 30 nats.
    """
    head_dim = key.shape[3]
    draw = torch.Generator().manual_seed(seed)
    direction = normalize(torch.randn(head_dim, generator=draw), dim=0)
    needle = direction * (30.0 * head_dim**0.5) ** 0.5
    key[:, :, at] = needle.to(key.dtype)
    query[:, :, list(rows)] = needle.to(query.dtype)
    value[:, :, at] = (4.0 * torch.randn(value.shape[3], generator=draw)).to(value.dtype)


def _drift(shape: InputShape, topic_tokens: int, draw: torch.Generator) -> torch.Tensor:
    """[B, Hkv, L, D] unit vectors that turn from one random direction to the next, with long stays at each."""
    stops = -(-shape.length // topic_tokens) + 1
    directions = torch.randn(shape.batch, shape.kv_heads, stops, shape.head_dim, generator=draw)
    position = torch.arange(shape.length) / topic_tokens
    stop = position.long()
    turn = torch.sigmoid(12 * (position - stop - 0.5))[:, None]
    mixed = directions[:, :, stop] * (1 - turn) + directions[:, :, stop + 1] * turn
    return normalize(mixed, dim=-1)
