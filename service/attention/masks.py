"""Masks. The index part of every mask is one interval [lo, hi) of keys per row; the rest is `attn_mask`.

`python -m service.attention.masks window` draws one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from service.attention.pairs import visible_pairs

if TYPE_CHECKING:
    from service.core.options import AttentionOptions

Bounds = tuple[torch.Tensor, torch.Tensor]
LARGEST_BIAS = 1e38  # a third of float32's range: times log2(e), plus a score, it is still a number


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Who may see whom. Row i of sequence b stands at key position p = i + offset_b.

    `causal_alignment` sets the offset: bottom_right: valid keys - Lq, top_left: 0, an integer: itself.
    Causal: keys j <= p. Window [l, r]: p - l <= j <= p + r, -1 unlimited. Both intersect.
    """

    is_causal: bool = False
    causal_alignment: str | int = "bottom_right"
    window: tuple[int, int] | None = None
    kv_lengths: torch.Tensor | None = None  # [B] int64: keys j < kv_lengths[b] are valid
    attn_mask: torch.Tensor | None = None  # bool (true = attend) or float (added), broadcastable to [B, Hq, Lq, Lk]
    cu_seqlens_q: tuple[int, ...] | None = None  # packed: B is 1 and sequence s owns rows cu[s]:cu[s+1];
    cu_seqlens_k: tuple[int, ...] | None = None  # everything above then applies inside each sequence

    def __post_init__(self) -> None:
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None):
            raise ValueError("cu_seqlens_q and cu_seqlens_k: give both or neither")
        if self.cu_seqlens_q is not None and self.kv_lengths is not None:
            raise ValueError("kv_lengths: packed sequences have no padding to leave out")
        if isinstance(self.causal_alignment, str) and self.causal_alignment not in ("bottom_right", "top_left"):
            raise ValueError(f"causal_alignment: expected bottom_right, top_left or int, got {self.causal_alignment!r}")

    def visible_pairs(self, query_length: int, key_length: int) -> int:
        """Of one head and sequence without kv_lengths and packing (`segments.split`), whatever attn_mask hides."""
        return visible_pairs(
            query_length,
            key_length,
            is_causal=self.is_causal,
            causal_alignment=self.causal_alignment,
            window=self.window,
        )


def mask_of(options: AttentionOptions, attn_mask: torch.Tensor | None = None) -> MaskSpec:
    """The mask that the options of a request describe."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = _within_float32(attn_mask)
    lengths = None if options.kv_lengths is None else torch.tensor(options.kv_lengths, dtype=torch.int64)
    return MaskSpec(options.is_causal, options.causal_alignment, options.window, lengths, attn_mask)


def _within_float32(bias: torch.Tensor) -> torch.Tensor:
    """Biases like finfo.min, which callers use for "hidden", stay finite when they are turned into bits; -inf stays."""
    if bias.numel() == 0 or float(bias.masked_fill(bias == -torch.inf, 0.0).abs().max()) <= LARGEST_BIAS:
        return bias
    return bias.clamp(-LARGEST_BIAS, LARGEST_BIAS).masked_fill(bias == -torch.inf, -torch.inf)


def bounds_at(mask: MaskSpec, rows: torch.Tensor, query_length: int, key_length: int) -> Bounds:
    """(lo, hi), int64 [B, ...], of the keys that rows [B or 1, ...] may see; B is 1 unless kv_lengths says more."""
    queries: torch.Tensor | int = query_length
    first: torch.Tensor | int = 0
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        cu_q = torch.tensor(mask.cu_seqlens_q, device=rows.device)
        cu_k = torch.tensor(mask.cu_seqlens_k, device=rows.device)
        sequence = torch.searchsorted(cu_q, rows.contiguous(), right=True) - 1
        first, length = cu_k[sequence], cu_k[sequence + 1] - cu_k[sequence]
        queries = cu_q[sequence + 1] - cu_q[sequence]
        rows = rows - cu_q[sequence]
    elif mask.kv_lengths is not None:
        length = mask.kv_lengths.to(rows.device).reshape(-1, *[1] * (rows.dim() - 1)).expand(-1, *rows.shape[1:])
    else:
        length = torch.full_like(rows, key_length)

    position = rows + offset_of(mask.causal_alignment, length, queries)
    lo, hi = torch.zeros_like(position), length
    if mask.window is not None:
        left, right = mask.window
        lo = position - left if left >= 0 else lo
        hi = position + right + 1 if right >= 0 else hi
    if mask.is_causal:
        hi = torch.minimum(hi, position + 1)
    lo = torch.minimum(lo.clamp(min=0), length)
    hi = torch.maximum(torch.minimum(hi, length), lo)
    return first + lo, first + hi


def offset_of(alignment: str | int, length: torch.Tensor | int, queries: torch.Tensor | int) -> torch.Tensor | int:
    """The key position of row 0."""
    match alignment:
        case "bottom_right":
            return length - queries
        case "top_left":
            return 0
        case int():
            return alignment
    raise ValueError(f"causal_alignment: {alignment!r}")


def row_bounds(
    mask: MaskSpec,
    batch: int,
    query_length: int,
    key_length: int,
    q_start: int = 0,
    q_end: int | None = None,
    device: torch.device | None = None,
) -> Bounds:
    """(lo, hi), int64 [B, q_end - q_start]: row i may see the keys lo <= j < hi."""
    rows = torch.arange(q_start, query_length if q_end is None else q_end, device=device)
    lo, hi = bounds_at(mask, rows[None], query_length, key_length)
    return lo.expand(batch, -1), hi.expand(batch, -1)


def as_bias(mask: torch.Tensor) -> torch.Tensor:
    """Float32 numbers to add to the scores; bool masks become 0 and -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask if mask.dtype == torch.float64 else mask.float()


def four(attn_mask: torch.Tensor) -> torch.Tensor:
    """The same mask with all four axes [B, Hq, Lq, Lk], broadcast ones of size 1."""
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def cut(attn_mask: torch.Tensor, batch: slice, heads: slice, rows: slice, keys: slice) -> torch.Tensor:
    """A block of the mask, as a view; broadcast axes stay of size 1."""
    view = four(attn_mask)
    wanted = (batch, heads, rows, keys)
    return view[tuple(part if size > 1 else slice(None) for part, size in zip(wanted, view.shape, strict=True))]


Index = torch.Tensor | int


def bias_at(attn_mask: torch.Tensor, batch: Index, heads: Index, rows: Index, keys: Index) -> torch.Tensor:
    """The mask's numbers at index tensors that broadcast against each other."""
    view = four(attn_mask)
    wanted = (batch, heads, rows, keys)
    picked = view[tuple(part if size > 1 else 0 for part, size in zip(wanted, view.shape, strict=True))]
    return as_bias(picked)


EXAMPLES: dict[str, tuple[MaskSpec, int, int]] = {
    "full": (MaskSpec(), 12, 24),
    "causal": (MaskSpec(is_causal=True), 12, 24),
    "top_left": (MaskSpec(is_causal=True, causal_alignment="top_left"), 12, 24),
    "window": (MaskSpec(window=(4, 2)), 24, 24),
    "causal_window": (MaskSpec(is_causal=True, window=(6, -1)), 24, 24),
    "kv_lengths": (MaskSpec(is_causal=True, kv_lengths=torch.tensor([17])), 12, 24),
    "packed": (MaskSpec(is_causal=True, cu_seqlens_q=(0, 5, 14, 24), cu_seqlens_k=(0, 5, 14, 24)), 24, 24),
}


def draw(mask: MaskSpec, query_length: int, key_length: int) -> str:
    """One line a row, `#` for a visible key."""
    lo, hi = row_bounds(mask, 1, query_length, key_length)
    pairs = zip(lo[0].tolist(), hi[0].tolist(), strict=True)
    return "\n".join("".join("#" if low <= j < high else "." for j in range(key_length)) for low, high in pairs)


def main(names: list[str]) -> None:
    for name in names or list(EXAMPLES):
        if name not in EXAMPLES:
            raise SystemExit(f"{name}: expected one of {', '.join(EXAMPLES)}")
        print(f"{name}\n{draw(*EXAMPLES[name])}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
