"""Two partial attentions over disjoint keys become one."""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Partial:
    """out: [..., L, Dv], lse: [..., L], natural log; float32 (float64 kept). A side without keys has lse -inf.

    Ref: o = o_a e^(l_a - l) + o_b e^(l_b - l), l = logaddexp(l_a, l_b) (ring-flash-attention utils.py).
    """
    share_a, share_b, lse = shares(lse_a, lse_b)
    dtype = torch.promote_types(lse.dtype, torch.float32)
    return out_a.to(dtype) * share_a[..., None] + out_b.to(dtype) * share_b[..., None], lse


def shares(lse_a: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., L] each -> the shares of both sides, which add up to 1 however large the numbers are, and their lse."""
    top = torch.maximum(lse_a, lse_b)
    base = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf is NaN
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    lse = base + total.log()
    total = total.masked_fill(total == 0, 1.0)
    return weight_a / total, weight_b / total, lse
