"""The benchmark of the predictions: its shapes are valid and held out, its figures are what its rows say."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from benchmarks import learning, peaks, predictions
from benchmarks.command import app
from benchmarks.predictions import Row
from service.core.options import AttentionOptions
from service.core.plan import PlanKind
from service.core.request import AttentionRequest, AttentionShape
from service.planning.attention_cost import attention_cost
from service.planning.calibration import DTYPES, runs


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


def test_regret_is_the_extra_time_over_the_best_plan() -> None:
    row = Row(1, 1, 8, 8, 8, "float32", False, {}, {"dense": 1.0, "chunked": 1.5, "sparse": 3.0}, "chunked")
    assert row.regret == pytest.approx(0.5)


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [(shape, causal) for shape, causal in predictions.shapes(60, seed=1) if shape.key_length < 300]
    monkeypatch.setattr(predictions, "shapes", lambda count, seed: small[:count])
    output = tmp_path / "figures.json"
    result = CliRunner().invoke(
        app, ["predictions", "--count", "3", "--rounds", "1", "--arrivals", "8", "--no-memory", "--output", str(output)]
    )
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
    (learned,) = figures["learning"]
    assert learned["runs"] >= 16
    assert 0 <= learned["within"] <= 1
    assert sum(runs for runs, *_ in learned["kinds"].values()) == learned["runs"]
    assert set(learned["estimate_s"]) == {"attention", "text"}
    assert all(0 < p50 <= p99 for p50, p99 in learned["estimate_s"].values())


def test_requests_are_a_mix_that_repeats_with_its_seed() -> None:
    found = [request for together in learning.mix(200, seed=3) for request in together]
    again = [request for together in learning.mix(200, seed=3) for request in together]
    assert [request.id for request in found] == [request.id for request in again]
    tensors = [request for request in found if isinstance(request, AttentionRequest)]
    assert {request.options.mode for request in tensors} == {"auto", "dense", "chunked", "sparse"}
    assert {request.options.is_causal for request in tensors} == {True, False}
    assert 0.3 < 1 - len(tensors) / len(found) < 0.9
    assert any(len(together) > 1 for together in learning.mix(50, seed=3))


def test_learned_and_bare_predictions_are_compared_on_the_same_runs() -> None:
    path = ("dense", "float32"), 1, "form"
    batch = ("dense", "float32"), 1, ("batch", "form")
    found = learning.summary(
        [learning.Run(path, 1.0, 2.0, 2.1), learning.Run(path, 1.0, 1.0, 1.1), learning.Run(batch, 1.0, 3.0, 1.0)], {}
    )
    assert (found.runs, found.within, found.within_bare) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.kinds == {"dense float32": (2, 1.0, 0.5), "dense float32, together": (1, 0.0, 1.0)}


def test_a_peak_is_measured_in_its_own_process() -> None:
    """32 MiB of inputs and output; the prediction is compared with the growth of the process."""
    made = "PlanKind.DENSE, AttentionShape(1, 8, 8, 4096, 4096, 64, 64), AttentionOptions(mode='dense')"
    code = f"from benchmarks.peaks import *; print(measured(Case({made})).actual_bytes)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shape = AttentionShape(1, 8, 8, 4096, 4096, 64, 64)
    predicted = attention_cost(PlanKind.DENSE, shape, AttentionOptions()).peak_bytes
    assert predicted / 1.5 < int(ran.stdout) < predicted * 1.5
    assert int(ran.stdout) > 32 * 2**20


def test_peaks_are_judged_on_both_sides() -> None:
    rows = [peaks.Row("a", "dense", size, 100) for size in (89, 90, 100, 120, 121)]
    found = peaks.figures(rows)
    assert (found.within, found.lowest, found.highest) == (pytest.approx(0.6), 0.89, 1.21)
