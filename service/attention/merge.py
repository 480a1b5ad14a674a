"""Two partial attentions over disjoint keys become one."""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Partial:
    """out: [..., L, Dv], lse: [..., L], natural log; float32 (float64 kept). A side without keys has lse -inf.

    Ref: o = o_a e^(l_a - l) + o_b e^(l_b - l), l = logaddexp(l_a, l_b) (ring-flash-attention utils.py).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf is NaN
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    dtype = torch.promote_types(lse.dtype, torch.float32)
    return out_a.to(dtype) * weight_a + out_b.to(dtype) * weight_b, lse
