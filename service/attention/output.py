"""What every attention variant answers with; the same structure from all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SLICE_FLOPS = 4e9  # ~40 ms at the 100 GFLOP/s that 2 AVX2 cores gave torch's attention kernel
Checkpoint = Callable[[], None]  # called between blocks of work; raises to stop the computation


@dataclass(frozen=True, slots=True)
class AttentionOutput:
    """out: [B, Hq, Lq, Dv] in the query's dtype; lse: [B, Hq, Lq], float32, natural log, -inf for empty rows.

    The other fields are set by sparse attention only.
    """

    out: torch.Tensor
    lse: torch.Tensor  # float64 where the query is float64 (tests only)
    density: float | None = None  # pairs_scored / visible pairs
    pairs_scored: int | None = None  # visible pairs of the selected blocks and the outlier columns, over all heads
    risky_rows: torch.Tensor | None = None  # [n, 3] int64 (batch, head, row): what the selector rates riskiest
    lse_read: torch.Tensor | None = None  # like lse, over the keys that were read; the rest of lse is estimated


def slice_flops(device: torch.device) -> float:
    """Of one call between checkpoints; a GPU is a few thousand times as fast (not measured)."""
    return SLICE_FLOPS * 2000 if device.type == "cuda" else SLICE_FLOPS


def no_checkpoint() -> None:
    """Nothing waits and nothing cancels."""
