"""The benchmark on a real decoder, with a small random one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import transformers as hf

from benchmarks import real_attention
from benchmarks.report import real_attention_table
from tests.models import zoo


def test_layers_of_a_decoder_are_measured_as_the_service_answers_them(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModelForCausalLM, tmp_path, max_position_embeddings=512)
    settings = real_attention.Settings(tmp_path, 1024, (0, 2), max_error=0.05, rounds=1)
    steps: list[str] = []
    layers = list(real_attention.run(settings, steps.append))
    assert len(steps) == real_attention.steps(settings)
    assert [layer.layer for layer in layers] == [0, 2]
    for layer in layers:
        assert layer.error <= max(layer.reported_upper, 1e-6)
        assert layer.ratio == pytest.approx(layer.sdpa_s / layer.seconds)
        assert (layer.antidiagonal_error is None) == (layer.density is None)
    assert real_attention_table(layers, "test").row_count == 3
    (tmp_path / "short.txt").write_text("a short text")
    with pytest.raises(ValueError, match="expected 4,096"):
        real_attention.ids_of(replace(settings, tokens=4096, text=tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"layers: expected 0 to 2, got \(0, 3\)"):
        real_attention.capture(replace(settings, layers=(0, 3)))
