"""Layers by rows: the same answers, and a checkpoint between the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from service.core.plan import PlanKind
from service.models import hook, preemption


class Layers(nn.Module):
    """What models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.plain = nn.Linear(12, 4, bias=False)
        self.conv = Conv1D(6, 4)
        self.act = ACT2FN["gelu"]

    def forward(self, states: torch.Tensor) -> Any:
        return self.act(self.conv(self.plain(self.act(self.linear(states)))))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Layers:
    torch.manual_seed(0)
    monkeypatch.setattr(preemption, "slice_flops", lambda device: 2 * 96 * 5.0)  # five rows of the largest
    monkeypatch.setattr(preemption, "SLICE_ELEMENTS", 60)
    return Layers()


@torch.inference_mode()
def test_rows_are_computed_in_slices_and_come_out_the_same(layers: Layers) -> None:
    states = torch.randn(3, 17, 8)
    expected = layers(states)
    preemption.install_checkpoints(layers)
    assert torch.equal(layers(states), expected)  # without a context nothing is cut
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1

    with hook.running(hook.ForwardContext(PlanKind.DENSE, checkpoint=checkpoint)):
        got = layers(states)
    assert torch.allclose(got, expected, atol=1e-6)
    assert got.shape == expected.shape
    assert calls >= 11 + 4 + 5  # 51 rows, five at a time by the first layer


def test_a_checkpoint_stops_a_layer_between_its_rows(layers: Layers) -> None:
    preemption.install_checkpoints(layers)
    left = 3

    def checkpoint() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise InterruptedError

    with hook.running(hook.ForwardContext(PlanKind.DENSE, checkpoint=checkpoint)), pytest.raises(InterruptedError):
        layers(torch.randn(100, 8))
