"""Our attention inside Transformers: `attend` behind the AttentionInterface, and in place of masks who sees whom.

A model's own code decides who sees whom by a function of two positions. `mask` reads that function and hands a small
`Pattern` through the model instead of an n x n tensor; what is neither causal, bidirectional nor a window is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.attention.block_map import exact_map
from service.attention.dispatch import attend
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec
from service.attention.output import Checkpoint, Scoring
from service.attention.segments import split
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.core.answer import ErrorReport, LayerReport
from service.core.plan import PlanKind
from service.models.output_budget import OutputBudget
from service.models.state_sample import StateSample

NAME = "farsight"
OWN_ATTENTION = "does not compute attention through the AttentionInterface"  # why a model is refused
MAX_WAIT = 64  # passes
PAYS = 0.4  # share of the visible pairs: sparse attention of a real model that scores more takes longer than exact
NARROW = 4096  # tokens that a row of a sliding window sees: below, an exact layer is faster than any selection


@dataclass(frozen=True, slots=True)
class Pattern:
    """Who sees whom within one sequence. `window`: [left, right] tokens around the query's own position."""

    is_causal: bool
    window: tuple[int, int] | None = None

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Bool, for positions of the same shape."""
        seen = key <= query if self.is_causal else torch.ones_like(query, dtype=torch.bool)
        if self.window is None:
            return seen
        return seen & (key >= query - self.window[0]) & (key <= query + self.window[1])


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call, as an observer of the pass sees it."""

    query: torch.Tensor  # [B, Hq, L, D]
    key: torch.Tensor
    mask: MaskSpec
    scoring: Scoring


@dataclass(slots=True)
class SparseHistory:
    """Attention modules of one model, by id, whose sparse answers did not pay or were over the bound: they are computed
    exactly for a while, twice as long each time."""

    waits: dict[int, int] = field(default_factory=dict)  # passes until sparse is tried again
    lengths: dict[int, int] = field(default_factory=dict)  # of the last wait

    def skips(self, module: int) -> bool:
        left = self.waits.get(module, 0)
        self.waits[module] = max(0, left - 1)
        return left > 0

    def learn(self, module: int, *, pays: bool) -> None:
        length = 0 if pays else min(MAX_WAIT, 2 * self.lengths.get(module, 2))
        self.lengths[module] = self.waits[module] = length


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What every attention call of one forward pass must know."""

    kind: PlanKind
    bound: ErrorBound | None = None  # of every call, unless there is a budget; given if the kind is sparse
    budget: OutputBudget | None = None  # of a sparse pass: what each call may be off by
    cu_seqlens: tuple[int, ...] | None = None  # None: each row of the batch is one sequence, without padding
    checkpoint: Checkpoint | None = None  # called at every layer and block; raises to stop the pass
    history: SparseHistory | None = None  # None: every call of a sparse pass is tried sparse
    observe: Callable[[AttentionCall], None] | None = None
    disturb: Callable[[int, torch.Tensor], torch.Tensor] | None = None  # replaces each call's output [B, Hq, L, Dv]
    sample: StateSample | None = None  # filled with rows of the last hidden states
    map_tiles: int = 0  # a side at most, of a map of where each call reads; 0: none. Of one sequence
    maps: list[torch.Tensor] = field(default_factory=list)  # [Hq, r, c] uint8 of each call, filled by the pass
    layers: list[LayerReport] = field(default_factory=list)  # filled by the pass
    patterns: list[tuple[Pattern, int, int]] = field(default_factory=list)  # with the numbers of queries and of keys
    positions: list[int] = field(default_factory=list)  # computed by each pass of the model, padding included

    def __post_init__(self) -> None:
        assert self.bound is not None or self.kind is not PlanKind.SPARSE, "bug: a sparse pass without its error bound"


_running: ContextVar[ForwardContext | None] = ContextVar("farsight_forward", default=None)


@contextmanager
def running(context: ForwardContext) -> Iterator[None]:
    """Attention calls of this thread belong to `context`: models do not hand unknown arguments down to all layers."""
    token = _running.set(context)
    try:
        yield
    finally:
        _running.reset(token)


def checkpoint() -> Checkpoint | None:
    """Of the pass that runs on this thread."""
    context = _running.get()
    return None if context is None else context.checkpoint


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Pattern | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, L, D], key and value [B, Hkv, Lk, D] -> ([B, L, Hq, D], no weights)."""
    context = _context()
    if attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", None)) is False:
        attention_mask = Pattern(is_causal=False)  # models of images make no mask at all
    if not isinstance(attention_mask, Pattern):
        # a model that brings a mask of its own is refused, the mask never ignored
        raise NotImplementedError(f"{type(module).__name__} brings an attention mask of its own")
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__} has attention sinks (s_aux)")
    if context.checkpoint is not None:
        context.checkpoint()
    mask = MaskSpec(
        is_causal=attention_mask.is_causal,
        causal_alignment="top_left",
        window=attention_mask.window,
        attn_mask=kwargs.get("position_bias"),
        cu_seqlens_q=context.cu_seqlens,
        cu_seqlens_k=context.cu_seqlens,
    )
    scoring = Scoring(scaling, kwargs.get("softcap"))
    if context.observe is not None:
        context.observe(AttentionCall(query, key, mask, scoring))
    context.patterns.append((attention_mask, query.shape[2], key.shape[2]))
    out = _attend(context, id(module), attention_mask, AttentionInputs(query, key, value, mask, scoring))
    if context.disturb is not None:
        out = context.disturb(len(context.patterns) - 1, out)
    return out.transpose(1, 2), None


def _attend(context: ForwardContext, module: int, pattern: Pattern, inputs: AttentionInputs) -> torch.Tensor:
    """[B, Hq, L, D]; a call of a sparse pass is reported to the context."""
    tensors, mask, scoring, checkpoint = inputs.tensors, inputs.mask, inputs.scoring, context.checkpoint
    if context.bound is None or context.kind is not PlanKind.SPARSE:
        _draw_exact(context, inputs)
        return attend(*tensors, context.kind, mask, scoring=scoring, checkpoint=checkpoint).out
    bound = context.bound
    if context.budget is not None:
        bound = bound.for_error(*context.budget.layer_error(context.layers))
    bound = replace(bound, map_tiles=context.map_tiles)
    visible = sum(segment.visible_pairs for segment in split(*tensors, mask))
    kind = _exact_anyway(bound, context.history, module, pattern)
    if kind is not None:
        context.layers.append(LayerReport(kind, ErrorReport(), None, visible))
        _draw_exact(context, inputs)
        return attend(*tensors, kind, mask, scoring=scoring, checkpoint=checkpoint).out
    found = attend_with_error_bound(*tensors, mask, bound, scoring=scoring, checkpoint=checkpoint)
    if context.history is not None:
        pays = found.kind is PlanKind.SPARSE and found.pairs_scored <= PAYS * visible
        context.history.learn(module, pays=pays)
    context.layers.append(LayerReport(found.kind, found.error, found.density, found.pairs_scored))
    if found.block_map is not None:
        context.maps.append(found.block_map.octets()[0].cpu())
    return found.out


def _draw_exact(context: ForwardContext, inputs: AttentionInputs) -> None:
    if context.map_tiles:
        found = exact_map(inputs.query, inputs.key, inputs.mask, context.map_tiles)
        context.maps.append(found.octets()[0].cpu())


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    **kwargs: Any,
) -> Pattern:
    """The pattern that the model's mask function draws, proven on the positions where patterns differ."""
    attention_mask: torch.Tensor | None = kwargs.get("attention_mask")
    local_size: int | None = kwargs.get("local_size")
    device: torch.device | str = kwargs.get("device", "cpu")
    pads = attention_mask is not None and not bool(attention_mask.all())  # BART's decoder makes one of ones
    if pads or kwargs.get("q_offset") or kwargs.get("kv_offset"):
        raise NotImplementedError("a padding mask or a cache: Farsight's passes have neither")
    context = _context()
    start, length = 0, q_length
    if context.cu_seqlens is not None and q_length == kv_length:
        start, stop = max(pairwise(context.cu_seqlens), key=lambda one: one[1] - one[0])
        length = stop - start
    query, key = _probes(length, kv_length if q_length != kv_length else length, local_size)
    zero = torch.zeros_like(query).to(device)
    seen = mask_function(zero, zero, (query + start).to(device), (key + start).to(device)).cpu().expand_as(query)
    for pattern in _candidates(local_size):
        if bool((pattern.sees(query, key) == seen).all()):
            return pattern
    raise NotImplementedError("an attention pattern that is neither causal, bidirectional nor a window of them")


def register() -> None:
    """Make `attn_implementation="farsight"` known; without the mask function Transformers drops masks silently."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _context() -> ForwardContext:
    context = _running.get()
    if context is None:
        raise RuntimeError("bug: a forward pass through Farsight's attention without its ForwardContext")
    return context


def _candidates(local_size: int | None) -> Iterator[Pattern]:
    if local_size is not None:  # first: within the window both are right, and longer inputs must not lose it
        yield Pattern(is_causal=True, window=(local_size - 1, 0))
        yield Pattern(is_causal=False, window=(local_size, local_size))
        yield Pattern(is_causal=False, window=(local_size - 1, local_size - 1))  # EmbeddingGemma
    for is_causal in (False, True):
        yield Pattern(is_causal)


def _probes(queries: int, keys: int, local_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of positions, both [n]: around the diagonal and the window's ends, and far away, for rows all over."""
    rows = torch.tensor(sorted({0, 1, 2, queries // 3, queries // 2, queries - 2, queries - 1})).clamp(0, queries - 1)
    steps = {0, 1, 2, 3, keys // 2, keys}
    if local_size is not None:
        steps |= {local_size - 1, local_size, local_size + 1, 2 * local_size}
    ends = torch.tensor(sorted(steps))
    key = (rows[:, None] + torch.cat((-ends, ends))[None]).clamp(0, keys - 1)
    return rows[:, None].expand_as(key).flatten(), key.flatten()


def _exact_anyway(bound: ErrorBound, history: SparseHistory | None, module: int, pattern: Pattern) -> PlanKind | None:
    """How a call of a sparse pass is computed exactly: narrow windows, and modules that sparse did not suit lately."""
    if pattern.window is not None and sum(pattern.window) < NARROW:
        return PlanKind.CHUNKED
    if history is not None and history.skips(module):
        return bound.exact_kind
    return None
