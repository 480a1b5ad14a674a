"""The inputs of one attention as one value: what defines its exact output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from service.attention.masks import MaskSpec, cut
from service.attention.output import DEFAULT_SCORING, Scoring

ALL = slice(None)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], who sees whom, and how scores are made."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskSpec
    scoring: Scoring = DEFAULT_SCORING

    @property
    def tensors(self) -> Tensors:
        return self.query, self.key, self.value

    def of_heads(self, batch: slice, heads: Sequence[int]) -> AttentionInputs:
        """Some query heads of some sequences, each with a copy of its keys and values.

        `batch` has all sequences if the mask has kv_lengths.
        """
        group = self.query.shape[1] // self.key.shape[1]
        index = torch.tensor(heads, device=self.query.device)
        key, value = (tensor[batch].index_select(1, index // group) for tensor in (self.key, self.value))
        mask = self.mask
        if mask.attn_mask is not None:
            view = cut(mask.attn_mask, batch, ALL, ALL, ALL)
            mask = replace(mask, attn_mask=view if view.shape[1] == 1 else view.index_select(1, index))
        return AttentionInputs(self.query[batch].index_select(1, index), key, value, mask, self.scoring)
