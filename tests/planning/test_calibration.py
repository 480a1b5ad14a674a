"""Seconds from cost features: the fit, what is measured, and the file that keeps it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.core.plan import PlanKind
from service.planning import calibration, profile_cache
from service.planning.attention_cost import CostFeatures
from service.planning.calibration import DTYPES, fit, runs
from service.planning.device_profile import DeviceProfile

CPU = torch.device("cpu")
PROFILE = DeviceProfile(
    "cpu", {(kind, dtype): (1e-4, 0.0, 1e-9, 2e-10, 1e-11) for kind in PlanKind for dtype in DTYPES},
    dict.fromkeys(DTYPES, 1e11), free_bytes=123,
)  # fmt: skip


@pytest.mark.parametrize("true", [(1e-4, 1e-5, 1e-9, 2e-9, 1e-11), (5e-4, 0.0, 0.0, 0.0, 2e-11)])
def test_the_fit_finds_what_made_the_times(true: tuple[float, ...]) -> None:
    counted = [run.features for run in runs("float32", thorough=True) if run.kind is PlanKind.CHUNKED]
    seconds = [sum(each * count for each, count in zip(true, features, strict=True)) for features in counted]
    assert fit(counted, seconds) == pytest.approx(true, rel=1e-3, abs=1e-13)


def test_the_fit_is_never_negative_and_weighs_relative_errors() -> None:
    draw = np.random.default_rng(0)
    counted = [CostFeatures(1, 0, int(n), int(n * n), int(128 * n * n)) for n in (16, 64, 256, 1024, 4096, 16384)]
    seconds = [(1e-4 + 1e-11 * features.flops) * float(np.exp(draw.normal(0, 0.1))) for features in counted]
    found = fit(counted, seconds)
    assert min(found) >= 0
    predicted = [sum(each * count for each, count in zip(found, features, strict=True)) for features in counted]
    assert np.abs(np.log(np.array(predicted) / seconds)).max() < 0.3
    assert found[1] == 0.0  # nothing was launched


def test_every_plan_and_dtype_is_measured_from_overhead_to_pairs() -> None:
    for thorough in (False, True):
        planned = [run for dtype in DTYPES for run in runs(dtype, thorough)]
        assert {(run.kind, run.shape.dtype) for run in planned} == {
            (kind, dtype) for kind in PlanKind for dtype in DTYPES
        }
        for kind in PlanKind:
            counts = [run.features.flops for run in planned if run.kind is kind]
            assert max(counts) > 10 * min(counts)
    assert len(runs("float32", thorough=True)) > len(runs("float32", thorough=False))


def test_a_measurement_prices_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small real runs; how good the predictions are is a benchmark's question (`python -m benchmarks predictions`)."""
    sizes = [(1, 16, 16, False), (2, 128, 16, True), (4, 256, 32, False), (2, 512, 32, True), (2, 640, 32, False)]
    monkeypatch.setattr(calibration, "_sizes", lambda kind, thorough: sizes)
    monkeypatch.setattr(calibration, "DTYPES", ("float32",))
    shares: list[float] = []
    profile = calibration.measure(CPU, progress=shares.append)
    assert shares == [index / 15 for index in range(15)]
    assert set(profile.attention_s_per) == {(kind, "float32") for kind in PlanKind}
    for run in runs("float32", False):
        assert 1e-6 < profile.attention_s(run.kind, run.features, "float32") < 60
    assert profile.linear_flops_per_s["float32"] > 0
    assert profile.free_bytes > 0


def test_nothing_is_predicted_to_take_no_time() -> None:
    assert PROFILE.attention_s(PlanKind.DENSE, CostFeatures(0, 0, 0, 0, 0), "float32") > 0


def test_a_stored_profile_is_read_again(tmp_path: Path) -> None:
    path = profile_cache.store(PROFILE, CPU, tmp_path)
    found = profile_cache.load(CPU, tmp_path)
    assert found is not None
    assert found.free_bytes > 1000  # of now, not of then
    assert replace(found, free_bytes=123) == PROFILE
    assert json.loads(path.read_text())["identity"]["torch"] == torch.__version__


def damaged(**changes: object) -> str:
    """A stored profile with some of its entries replaced."""
    document = profile_cache._document(PROFILE)
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) and value else value
    return json.dumps({"profile": document})


BAD = [
    "", "{", "{}", "[]", damaged(attention_s_per=[]), damaged(attention_s_per={}), damaged(linear_flops_per_s={}),
    damaged(attention_s_per={"fast float32": [0, 0, 0, 0, 0]}),
    damaged(attention_s_per={"dense float32": [0, 0, 0, 0]}),
    damaged(attention_s_per={"dense float32": [0, 0, 0, 0, float("nan")]}),
    damaged(attention_s_per={"dense float32": [0, 0, 0, 0, -1.0]}), damaged(linear_flops_per_s={"float32": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_used_is_measured_again(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "measure", lambda device: PROFILE)
    profile_cache.path_of(CPU, tmp_path).write_text(text)
    assert profile_cache.load(CPU, tmp_path) is None
    assert profile_cache.load_or_measure(CPU, tmp_path) == PROFILE
    assert profile_cache.load(CPU, tmp_path) is not None


def test_another_software_or_thread_count_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_cache.store(PROFILE, CPU, tmp_path)
    assert profile_cache.load(CPU, tmp_path) is not None
    known = profile_cache.identity(CPU)
    for change in ({"torch": "0.0"}, {"device": "other, 1 threads"}, {"version": 0}):
        monkeypatch.setattr(profile_cache, "identity", lambda device, change=change: known | change)
        assert profile_cache.load(CPU, tmp_path) is None
    assert str(torch.get_num_threads()) in known["device"]


def test_replicas_that_start_together_measure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    started = threading.Event()

    def slow(device: torch.device) -> DeviceProfile:
        calls.append(1)
        started.wait(0.2)
        return PROFILE

    monkeypatch.setattr(profile_cache, "measure", slow)
    threads = [threading.Thread(target=profile_cache.load_or_measure, args=(CPU, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_directory_that_cannot_be_written_only_costs_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(profile_cache, "measure", lambda device: PROFILE)
    assert profile_cache.load_or_measure(CPU, tmp_path / "file" / "cache") == PROFILE
    assert "calibration not stored" in caplog.text
    monkeypatch.delenv("HOME", raising=False)
    assert profile_cache.load_or_measure(CPU, Path("~nobody-of-that-name/cache")) == PROFILE


def test_a_profile_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_cache.store(PROFILE, CPU, tmp_path)
    monkeypatch.setattr(profile_cache, "measure", None)
    monkeypatch.setattr(profile_cache, "exclusive", None)  # not even the lock is asked for
    assert replace(profile_cache.load_or_measure(CPU, tmp_path), free_bytes=123) == PROFILE
