"""Our attention inside Transformers: `attend` behind the AttentionInterface, with what a forward pass must carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from service.attention import attend
from service.attention.masks import MaskSpec
from service.core import Plan

NAME = "farsight"


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Handed through the model's keyword arguments to every attention call of one packed forward pass."""

    plan: Plan
    cu_seqlens: tuple[int, ...]  # sequence s owns tokens cu_seqlens[s]:cu_seqlens[s+1]
    checkpoint: Callable[[], None] | None = None  # called at every layer; raises to stop the pass


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    farsight: ForwardContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], no weights)."""
    if farsight is None:
        raise RuntimeError("bug: a forward pass through Farsight's attention without its ForwardContext")
    if attention_mask is not None:
        # a model that insists on a mask of its own cannot be packed: refuse, never ignore the mask
        raise NotImplementedError("packed forward passes take no attention mask")
    if farsight.checkpoint is not None:
        farsight.checkpoint()
    mask = MaskSpec(
        is_causal=bool(getattr(module, "is_causal", False) if is_causal is None else is_causal),
        cu_seqlens_q=farsight.cu_seqlens,
        cu_seqlens_k=farsight.cu_seqlens,
    )
    result = attend(query, key, value, farsight.plan, mask, scale=scaling, checkpoint=farsight.checkpoint)
    return result.out.transpose(1, 2), None


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None for plain bidirectional attention (the packing says who sees whom), else a real mask: never lost."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True})


def register() -> None:
    """Make `attn_implementation="farsight"` known; without the mask function Transformers drops masks silently."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
