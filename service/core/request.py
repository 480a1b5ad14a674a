"""Requests: attention over tensors, or one task of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core.options import AttentionOptions, ForwardOptions, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], on the CPU, validated and finite."""

    id: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions
    attn_mask: torch.Tensor | None = None
    rank: int = 4  # 3: the caller's tensors have no batch axis, and neither has the answer
    tenant: str = "default"
    endpoint: str = "attention"  # the route that it came by, as metrics and ledger name it

    @property
    def model(self) -> str:
        return "attention"

    @property
    def shape(self) -> AttentionShape:
        """Computed at each access."""
        batch, heads, query_length, head_dim = self.query.shape
        return AttentionShape(
            batch=batch,
            heads=heads,
            kv_heads=self.key.shape[1],
            query_length=query_length,
            key_length=self.key.shape[2],
            head_dim=head_dim,
            value_dim=self.value.shape[3],
            dtype=str(self.query.dtype).removeprefix("torch."),
        )


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes that determine the cost of attention. Lengths are in tokens."""

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """Inputs of one kind for one task of one model.

    Exactly one of `texts`, `token_ids`, `pairs` (query and document, or source and target), `images` and `audio`
    (encoded files) and `features` is given.
    """

    id: str
    model: str
    task: Task
    options: ForwardOptions
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    token_types: tuple[tuple[int, ...], ...] = ()  # of each row of `token_ids`; none: all zero
    pairs: tuple[tuple[str, str], ...] = ()
    images: tuple[bytes, ...] = ()
    audio: tuple[bytes, ...] = ()
    # preprocessed for the model: pixels [n, C, H, W] or spectrograms [n, mel bands, frames], float32
    features: torch.Tensor | None = None
    query: int | str | None = None  # explain: the query token, by index or as a part of the text
    tenant: str = "default"
    endpoint: str = "embeddings"  # the route that it came by, as metrics and ledger name it


Request = AttentionRequest | ForwardRequest
