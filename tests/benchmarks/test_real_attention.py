"""The benchmark on a real decoder, with a small random one; and the sketch of ordered leaves that it compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import ordered_leaves, real_attention
from benchmarks.ordered_leaves import FINE, LEAF, SEGMENT
from benchmarks.report import real_attention_table
from service.attention.synthetic import InputShape, structured
from tests.models import zoo


def exact(tensors: Any) -> torch.Tensor:
    return scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)


def test_leaves_that_are_all_read_are_exact_attention() -> None:
    tensors = structured(InputShape(1, 4, 2, 2048, 64))
    out, density = ordered_leaves.attend(*tensors, 64**-0.5, threshold=0.0)
    torch.testing.assert_close(out, exact(tensors), atol=1e-4, rtol=1e-3)
    assert density == pytest.approx(1.0, abs=0.1)  # outliers are read twice, windows less than whole


def test_fewer_leaves_are_read_for_a_larger_error() -> None:
    tensors = structured(InputShape(1, 4, 2, 4096, 64))
    right, found = exact(tensors), []
    for threshold in (0.01, 0.05, 0.2):
        out, density = ordered_leaves.attend(*tensors, 64**-0.5, threshold)
        found.append((density, float((out - right).norm() / right.norm())))
    densities, errors = zip(*found, strict=True)
    assert sorted(densities, reverse=True) == list(densities)
    assert sorted(errors) == list(errors)
    assert densities[1] < 0.5
    assert errors[1] < 0.1


def test_keys_are_ordered_within_their_segments_and_like_ones_stand_together() -> None:
    centres = 5 * torch.randn(SEGMENT // LEAF, 16, generator=torch.Generator().manual_seed(0))
    mixed = torch.randperm(SEGMENT, generator=torch.Generator().manual_seed(1))
    keys = torch.cat([centres.repeat_interleave(LEAF, 0)[mixed]] * 2)
    for segment in (SEGMENT, FINE):
        order = ordered_leaves.ordered(keys, segment).view(-1, segment)
        assert torch.equal(order.sort(1).values, torch.arange(2 * SEGMENT).view(-1, segment))
    leaves = keys[ordered_leaves.ordered(keys, SEGMENT)].view(-1, LEAF, 16)
    together = (leaves - leaves.mean(1, keepdim=True)).square().sum()
    apart = (keys.view(-1, LEAF, 16) - keys.view(-1, LEAF, 16).mean(1, keepdim=True)).square().sum()
    assert together < 0.3 * apart


def test_ragged_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 1024 tokens, got 1500"):
        ordered_leaves.attend(*structured(InputShape(1, 1, 1, 1500, 16)), 0.25, 0.1)


def test_layers_of_a_decoder_are_measured_as_the_service_answers_them(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModelForCausalLM, tmp_path, max_position_embeddings=512)
    settings = real_attention.Settings(tmp_path, 1024, (0, 2), max_error=0.05, threshold=0.05, rounds=1)
    steps: list[str] = []
    layers = list(real_attention.run(settings, steps.append))
    assert len(steps) == real_attention.steps(settings)
    assert [layer.layer for layer in layers] == [0, 2]
    for layer in layers:
        assert layer.error <= max(layer.reported_upper, 1e-6)
        assert layer.ratio == pytest.approx(layer.sdpa_s / layer.seconds)
        assert layer.leaves_error < 0.5
    assert real_attention_table(layers, "test").row_count == 3
    (tmp_path / "short.txt").write_text("a short text")
    with pytest.raises(ValueError, match="expected 4,096"):
        real_attention.ids_of(replace(settings, tokens=4096, text=tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"layers: expected 0 to 2, got \(0, 3\)"):
        real_attention.capture(replace(settings, layers=(0, 3)))
