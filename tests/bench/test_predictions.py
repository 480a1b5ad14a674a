"""The benchmark of the predictions: its shapes are valid and held out, its figures are what its rows say."""

from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from service.bench import app, predictions
from service.bench.predictions import Row
from service.engine.calibration import DTYPES, runs


def test_shapes_are_a_mix_that_calibration_never_saw() -> None:
    found = predictions.shapes(60, seed=12345)
    assert len(found) == 60
    assert found == predictions.shapes(60, seed=12345)
    measured = {run.shape for dtype in DTYPES for run in runs(dtype, thorough=True)}
    assert not measured & {shape for shape, _ in found}
    assert {shape.dtype for shape, _ in found} == {"float32", "bfloat16"}
    assert any(shape.heads > shape.kv_heads for shape, _ in found)
    assert any(shape.query_length < shape.key_length for shape, _ in found)
    assert max(shape.key_length for shape, _ in found) > 16384 > min(shape.key_length for shape, _ in found)


def test_regret_is_what_the_choice_took_beyond_the_best() -> None:
    row = Row(1, 1, 8, 8, 8, "float32", False, {}, {"dense": 1.0, "chunked": 1.5, "sparse": 3.0}, "chunked")
    assert row.regret == pytest.approx(0.5)


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [(shape, causal) for shape, causal in predictions.shapes(60, seed=1) if shape.key_length < 300]
    monkeypatch.setattr(predictions, "shapes", lambda count, seed: small[:count])
    output = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["predictions", "--count", "3", "--rounds", "1", "--output", str(output)])
    assert result.exit_code == 0, result.output
    figures = orjson.loads(output.read_bytes())["figures"]
    assert figures["shapes"] == 3
    for row in figures["rows"]:
        assert set(row["actual_s"]) == set(row["predicted_s"]) == {"dense", "chunked", "sparse"}
        assert row["chosen"] in row["actual_s"]
        assert min(row["actual_s"].values()) > 0
    assert set(figures["within"]) == {"dense", "chunked", "sparse"}
    assert figures["mean_regret"] >= 0
    assert "mean regret" in result.output
