"""Inputs with planted structure, as long contexts have it, and without: what tests, benchmarks and load tests use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Needle:
    """One key that a few rows of every head look for; a row that two needles were given looks for the later one."""

    at: int
    rows: tuple[int, ...]


def diffuse(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensors:
    """Independent Gaussians: not sparse, 95 % of the mass needs ~95 % of the blocks. The honest counter-example."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads), (batch, kv_heads), (batch, kv_heads))
    query, key, value = (torch.randn(*shape, length, head_dim, generator=draw).to(dtype) for shape in shapes)
    return query, key, value


def structured(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    topic_tokens: int = 256,
    focus: float = 12.0,
    sinks: int = 4,
    needles: int = 4,
) -> Tensors:
    """query [B, Hq, L, D], key and value [B, Hkv, L, D] with sinks, locality, drifting topics and needles.

    A topic is a direction that turns every `topic_tokens` tokens; a query looks for its own topic (locality) and for
    an earlier one, `focus` nats above the rest; every query gives the first `sinks` keys some mass. Each needle is one
    key of the first half that sixteen later rows look for.
    """
    tensors, _ = planted(
        batch, heads, kv_heads, length, head_dim, dtype, seed,
        topic_tokens=topic_tokens, focus=focus, sinks=sinks, needles=needles,
    )  # fmt: skip
    return tensors


def planted(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    topic_tokens: int = 256,
    focus: float = 12.0,
    sinks: int = 4,
    needles: int = 4,
) -> tuple[Tensors, tuple[Needle, ...]]:
    """What `structured` draws, and where its needles are."""
    draw = torch.Generator().manual_seed(seed)
    group = heads // kv_heads
    strength = (focus * head_dim**0.5) ** 0.5  # |q| = |k|, so that q.k / sqrt(D) = focus on the same topic

    topics = _drift(batch, kv_heads, length, head_dim, topic_tokens, draw)
    noise = torch.randn(batch, kv_heads, length, head_dim, generator=draw)
    key = strength * topics + 0.3 * noise
    value = topics * head_dim**0.5 + torch.randn(batch, kv_heads, length, head_dim, generator=draw)

    segment = torch.arange(length) // (2 * topic_tokens)
    earlier = (torch.rand(int(segment[-1]) + 1, generator=draw)[segment] * torch.arange(length)).long()
    query = strength * (topics + 0.7 * topics[:, :, earlier]).repeat_interleave(group, dim=1)
    query += 0.3 * torch.randn(batch, heads, length, head_dim, generator=draw)

    sink = torch.nn.functional.normalize(torch.randn(head_dim, generator=draw), dim=0)
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
    """In place: `rows` look for the key at `at` and, where they may see it, find it with a score of 30 nats."""
    head_dim = key.shape[3]
    draw = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(head_dim, generator=draw), dim=0)
    needle = direction * (30.0 * head_dim**0.5) ** 0.5
    key[:, :, at] = needle.to(key.dtype)
    query[:, :, list(rows)] = needle.to(query.dtype)
    value[:, :, at] = (4.0 * torch.randn(value.shape[3], generator=draw)).to(value.dtype)


def _drift(
    batch: int, heads: int, length: int, head_dim: int, topic_tokens: int, draw: torch.Generator
) -> torch.Tensor:
    """[B, H, L, D] unit vectors that turn from one random direction to the next, with long stays at each."""
    stops = -(-length // topic_tokens) + 1
    directions = torch.randn(batch, heads, stops, head_dim, generator=draw)
    place = torch.arange(length) / topic_tokens
    here = place.long()
    turn = torch.sigmoid(12 * (place - here - 0.5))[:, None]
    mixed = directions[:, :, here] * (1 - turn) + directions[:, :, here + 1] * turn
    return torch.nn.functional.normalize(mixed, dim=-1)
