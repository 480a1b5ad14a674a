"""What the tests of attention share: the error budget and random inputs of every shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from service.attention import dispatch, reference
from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring
from service.attention.segments import Segment, join, split
from service.attention.sparse import attend as sparse
from service.attention.sparse.selection import SelectionSettings, select
from service.core.plan import PlanKind

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# with so small an epsilon sparse attention drops nothing that can be told from rounding
FINE = SelectionSettings(block_size=16, epsilon=1e-7)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kind: PlanKind,
    mask: MaskSpec,
    *,
    settings: SelectionSettings = FINE,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """`dispatch.attend`, but sparse attention selects with `settings`."""
    if kind is not PlanKind.SPARSE:
        return dispatch.attend(query, key, value, kind, mask, scoring=scoring, checkpoint=checkpoint)

    def run(segment: Segment) -> AttentionOutput:
        inputs = *segment.tensors, segment.mask
        chosen = select(*inputs, settings, scoring=scoring, checkpoint=checkpoint)
        return sparse.attend(*inputs, chosen, scoring=scoring, checkpoint=checkpoint)

    return join(query, value, split(query, key, value, mask), run)


def clustered(
    query_length: int = 700, key_length: int = 700, *, batch: int = 1, seed: int = 0, dim: int = 32
) -> Tensors:
    """Eight topics that come in any order, as words do: keys that are alike are no neighbours."""
    draw = torch.Generator().manual_seed(seed)
    topics = torch.randn(8, dim, generator=draw)
    asked = torch.randint(8, (batch, 4, query_length), generator=draw)
    given = torch.randint(8, (batch, 2, key_length), generator=draw)

    def around(of: torch.Tensor, noise: float) -> torch.Tensor:
        return topics[of] + noise * torch.randn(*of.shape, dim, generator=draw)

    return around(asked, 0.3), around(given, 0.3), around(given, 1.0)


def assert_within_budget(
    output: AttentionOutput,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    scoring: Scoring = DEFAULT_SCORING,
) -> None:
    """`output` may err at most twice as much as naive attention of the same dtype (rule of flash-attention's tests)."""
    exact = reference.attend(query.double(), key.double(), value.double(), _double(mask), scoring=scoring)
    naive = reference.attend(query, key, value, mask, scoring=scoring)
    eps = torch.finfo(query.dtype).eps

    def worst(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x.double() - y).abs().max())

    assert output.out.dtype == query.dtype
    budget = 2 * (worst(naive.out, exact.out) + eps * float(exact.out.abs().max()))
    assert worst(output.out, exact.out) <= budget + 1e-7
    assert torch.equal(output.lse == -torch.inf, exact.lse == -torch.inf)
    seen = exact.lse != -torch.inf
    if seen.any():
        told, right, rough = output.lse[seen], exact.lse[seen], naive.lse[seen]
        assert worst(told, right) <= 2 * (worst(rough, right) + eps * (1 + float(right.abs().max())))


def _double(mask: MaskSpec) -> MaskSpec:
    if mask.attn_mask is None or mask.attn_mask.dtype == torch.bool:
        return mask
    return replace(mask, attn_mask=mask.attn_mask.double())


@dataclass(frozen=True)
class Case:
    """One attention with everything that can vary."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskSpec
    scale: float | None
    softcap: float | None

    @property
    def tensors(self) -> Tensors:
        return self.query, self.key, self.value

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.softcap)


@st.composite
def cases(draw: st.DrawFn, max_length: int = 70) -> Case:
    """Sizes, grouped heads, Dv != D, cross lengths and every kind of mask, alone and together."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    query_length, key_length = draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    head_dim, value_dim = draw(st.sampled_from([1, 8, 16])), draw(st.sampled_from([1, 8, 24]))
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    heads = kv_heads * group
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    query = torch.randn(batch, heads, query_length, head_dim).to(dtype)
    key = torch.randn(batch, kv_heads, key_length, head_dim).to(dtype)
    value = torch.randn(batch, kv_heads, key_length, value_dim).to(dtype)
    edge = st.integers(-1, max_length)
    lengths = st.lists(st.integers(0, key_length), min_size=batch, max_size=batch)
    mask = MaskSpec(
        is_causal=draw(st.booleans()),
        causal_alignment=draw(st.sampled_from(["bottom_right", "top_left"]) | st.integers(-20, 20)),
        window=draw(st.none() | st.tuples(edge, edge)),
        kv_lengths=draw(st.none() | lengths.map(lambda x: torch.tensor(x, dtype=torch.int64))),
        attn_mask=draw(_attn_masks(batch, heads, query_length, key_length)),
    )
    scale = draw(st.none() | st.floats(0.05, 1.0))
    return Case(query, key, value, mask, scale, draw(st.none() | st.floats(0.5, 20.0)))


@st.composite
def _attn_masks(draw: st.DrawFn, *shape: int) -> torch.Tensor | None:
    kind = draw(st.sampled_from(["none", "bool", "float", "holes"]))
    if kind == "none":
        return None
    sizes = [size if draw(st.booleans()) else 1 for size in shape]
    dims = draw(st.integers(0, 4))
    noise = torch.randn(sizes[4 - dims :])
    if kind == "bool":
        return noise > -0.5
    return noise if kind == "float" else noise.masked_fill(noise > 0.5, -torch.inf)
