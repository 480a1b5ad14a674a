"""What every attention variant takes besides tensors and mask, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from service.attention.geometry import SLICE_FLOPS

Checkpoint = Callable[[], None]  # called between blocks of work; raises to stop the computation


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made of q·k: softcap(scale * q·k)."""

    scale: float | None = None  # None: 1/sqrt(head_dim)
    softcap: float | None = None  # c: scores become c * tanh(score / c); None: as they are

    def scale_for(self, head_dim: int) -> float:
        """The factor on q·k for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


DEFAULT_SCORING = Scoring()


@dataclass(frozen=True, slots=True)
class AttentionOutput:
    """out: [B, Hq, Lq, Dv] in the query's dtype; lse: [B, Hq, Lq], float32, natural log, -inf for empty rows.

    Only sparse attention sets the other fields.
    """

    out: torch.Tensor
    lse: torch.Tensor  # float64 if the query is float64 (tests only)
    density: float | None = None  # pairs_scored / visible pairs; heads left to the caller count as read
    pairs_scored: int | None = None  # visible pairs that were read, and one for each centroid, over all heads
    risky_rows: torch.Tensor | None = None  # [n, 3] int64 (batch, head, row): rows with the least mass read
    lse_read: torch.Tensor | None = None  # like lse, over the keys that were read; the rest of lse is estimated


def slice_flops(device: torch.device) -> float:
    """FLOPs of one call between checkpoints; a GPU is a few thousand times as fast (not measured)."""
    return SLICE_FLOPS * 2000 if device.type == "cuda" else SLICE_FLOPS


def no_checkpoint() -> None:
    """Do nothing: the work is neither paused nor cancelled."""
