"""The inputs of one attention as one value: what defines its exact output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, Scoring

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
