"""What is asked: attention over tensors, or one task of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core.options import AttentionOptions, ForwardOptions, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], validated and finite, on the CPU."""

    id: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions
    attn_mask: torch.Tensor | None = None
    rank: int = 4  # 3: the caller left the batch axis out, and gets its answer without it
    tenant: str = "default"

    @property
    def shape(self) -> AttentionShape:
        """Made anew at each call; callers keep it."""
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
    """The sizes that decide what attention costs."""

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
    """Inputs for one task of one model: texts, token ids, pairs of texts (query and document, or source and target),
    or encoded images."""

    id: str
    model: str
    task: Task
    options: ForwardOptions
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    images: tuple[bytes, ...] = ()
    pixel_values: torch.Tensor | None = None  # [n, C, H, W] float32: images as the model takes them
    query: int | str | None = None  # explain: the token that looks, by index or as a part of the text
    tenant: str = "default"


Request = AttentionRequest | ForwardRequest
