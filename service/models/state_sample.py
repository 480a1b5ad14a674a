"""Some rows of the last hidden states: enough to compare two passes over the same inputs, and small enough to keep."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SAMPLED = 256  # rows of each pass


@dataclass(frozen=True, slots=True)
class StateSample:
    """Filled by the passes of one request; two samples of one seed have the same rows."""

    seed: int
    rows: list[torch.Tensor] = field(default_factory=list)  # of each pass [at most SAMPLED, H] float32, on the CPU

    def take(self, states: torch.Tensor) -> None:
        """states [T, H] of one pass."""
        draw = torch.Generator().manual_seed(self.seed)
        index = torch.randperm(len(states), generator=draw)[:SAMPLED]
        self.rows.append(states[index.to(states.device)].float().cpu())
