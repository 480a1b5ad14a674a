"""`python -m benchmarks attention`: end to end at tiny lengths, and what it measures against what is known."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import antidiagonal, attention, contenders
from benchmarks.attention import (
    Length,
    Row,
    growth,
    race,
    truth_of,
    with_peak,
)
from benchmarks.command import app
from benchmarks.contenders import (
    Absent,
    Ran,
    Settings,
    inputs_of,
)
from service.attention import dense
from service.attention.dispatch import attend
from service.core.plan import PlanKind

SMALL = Settings(lengths=(256,), heads=2, kv_heads=1, head_dim=16, dtype="float32", rounds=1)
CPU = torch.device("cpu")
BASE = ("attention", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "2")


def bench(directory: Path, *options: str) -> tuple[dict[str, Any], str]:
    """(the JSON document, what was printed)."""
    arguments = [*BASE, *options, "--output", str(directory / "figures.json")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return orjson.loads((directory / "figures.json").read_bytes()), result.output


def rows_of(document: dict[str, Any], length: int) -> dict[str, dict[str, Any]]:
    found = {found_length["length"]: found_length for found_length in document["figures"]["lengths"]}
    return {row["name"]: row for row in found[length]["rows"]}


def test_everybody_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/__main__.py", "attention", "--lengths", "512,256"])
    document, printed = bench(tmp_path, "--lengths", "512,256", "--max-error", "1", "--plots", str(tmp_path / "plots"))
    assert document["command"] == "python -m benchmarks attention --lengths 512,256"
    assert document["versions"]["torch"] == torch.__version__
    assert document["hardware"]
    assert document["figures"]["settings"]["is_causal"] is True
    assert [found_length["length"] for found_length in document["figures"]["lengths"]] == [256, 512]
    for length in (256, 512):
        rows = rows_of(document, length)
        assert list(rows) == ["sdpa", "dense", "chunked", "sparse", "antidiagonal"]
        for name, row in rows.items():
            assert row["kind"] == name
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
            assert row["speedup"] == pytest.approx(rows["sdpa"]["median_s"] / row["median_s"])
            assert not row["fallback"]
        assert max(rows[name]["error"] for name in ("sdpa", "dense", "chunked")) < 0.01  # bfloat16
        assert rows["sparse"]["error"] < 0.02
        assert rows["sparse"]["needle_error"] < 0.02
        assert 0 < rows["sparse"]["reported_relative_l2"] <= rows["sparse"]["reported_relative_l2_upper"]
        assert rows["sparse"]["epsilon"] > 0
        assert 0 < rows["sparse"]["density"] <= 1.05
        assert 0 < rows["antidiagonal"]["threshold"] < 1
        assert printed.count("antidiagonal") == 2
    (grown,) = document["figures"]["growth"]
    ratio = rows_of(document, 512)["sparse"]["median_s"] / rows_of(document, 256)["sparse"]["median_s"]
    assert 2 ** grown["exponent"] == pytest.approx(ratio)
    assert f"256 to 512 tokens: n^{grown['exponent']:.2f}" in printed
    plots = sorted((tmp_path / "plots").iterdir())
    assert [plot.name for plot in plots] == ["density.png", "error.png", "memory.png", "speedup.png"]
    for plot in plots:
        start = plot.read_bytes()[:24]
        assert start[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", start[16:])) > 300


def test_a_fallback_is_not_counted_as_sparse(tmp_path: Path) -> None:
    document, printed = bench(
        tmp_path, "--lengths", "256,512", "--max-error", "0", "--input", "diffuse", "--bidirectional",
        "--no-antidiagonal",
    )  # fmt: skip
    for length in (256, 512):
        row = rows_of(document, length)["sparse"]
        assert row["fallback"]
        assert row["kind"] == "dense"
        assert row["density"] is None
        assert row["rejected_relative_l2_upper"] > 0
        assert "recomputed exactly" in row["reason"]
        assert row["needle_error"] is None
    assert document["figures"]["growth"] == []
    assert printed.count("sparse: dense") == 2
    assert "n^" not in printed


def test_what_is_over_its_limit_is_absent_and_says_so(tmp_path: Path) -> None:
    document, printed = bench(tmp_path, "--lengths", "256,300", "--dense-limit", "256", "--antidiagonal-limit", "299")
    assert all(row["median_s"] for row in rows_of(document, 256).values())
    longer = rows_of(document, 300)
    assert {name for name, row in longer.items() if row["kind"] == "absent"} == {"dense", "chunked", "antidiagonal"}
    assert longer["chunked"]["absent"] == "300 tokens are over its limit of 256"
    assert longer["chunked"]["median_s"] is longer["chunked"]["error"] is None
    assert longer["sparse"]["median_s"] > 0
    assert "chunked: 300 tokens are over its limit of 256" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lengths", "256,x"), "lengths: expected comma-separated numbers of at least 2, got '256,x'"),
        (("--heads", "3", "--kv-heads", "2"), "expected a multiple of kv-heads 2, got 3"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, [*BASE, *options], env={"COLUMNS": "120"})
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("is_causal", [True, False])
def test_errors_are_true_over_all_rows_and_over_some(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(replace(SMALL, is_causal=is_causal), 256)
    out = attend(*inputs.tensors, PlanKind.CHUNKED, inputs.mask).out
    whole = truth_of(inputs, 0)
    monkeypatch.setattr(attention, "EXACT_LIMIT", 255)
    monkeypatch.setattr(attention, "EXACT_ROWS", 64)
    some = truth_of(inputs, 0)
    assert whole.rows.shape == (2, 256)
    assert some.rows.shape == (2, 64)
    assert not torch.equal(some.rows[0], some.rows[1])
    audited = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:64]  # of the same seed
    assert not torch.equal(some.rows[0], audited)
    for truth in (whole, some):
        assert truth.error(out) < 1e-5
        assert truth.error(out * 1.25) == pytest.approx(0.25, rel=1e-4)
        assert truth.error(torch.zeros_like(out)) == 1


def test_the_needles_rows_are_judged_apart() -> None:
    inputs = inputs_of(SMALL, 256)
    truth = truth_of(inputs, 0)
    out = dense.attend(*inputs.tensors, inputs.mask).out
    assert truth.needle_error(out) is not None
    assert (truth.needle_error(out) or 1) < 1e-5
    lost = out.clone()
    lost[0, 1, inputs.needles[-1].rows[3]] = 0
    assert truth.needle_error(lost) == 1
    elsewhere = out.clone()
    looking = {row for needle in inputs.needles for row in needle.rows}
    elsewhere[0, :, next(row for row in range(256) if row not in looking)] = 0
    assert (truth.needle_error(elsewhere) or 1) < 1e-5


def test_contenders_take_turns_and_the_first_run_is_not_timed() -> None:
    ran: list[str] = []

    def contender(name: str, first_s: float, later_s: float) -> Callable[[], Ran]:
        def run() -> Ran:
            time.sleep(later_s if name in ran else first_s)
            ran.append(name)
            return Ran(torch.zeros(1), f"{name} {'later' if ran.count(name) > 2 else 'at first'}")

        return run

    stepped: list[str] = []
    runs = {"a": contender("a", 0.2, 0.03), "b": contender("b", 0.2, 0.001)}
    raced = race(runs, 2, CPU, stepped.append)
    assert ran == stepped == ["a", "b", "a", "b", "a", "b"]
    assert all(seconds >= 0.03 for seconds in raced["a"].seconds)
    assert min(raced["b"].seconds) < 0.03
    assert raced["a"].kinds == {"a at first", "a later"}  # an answer of another kind is not lost


def test_peak_memory_is_that_of_the_run_itself() -> None:
    held = torch.ones(8 * 2**20)

    def run() -> Ran:
        scratch = torch.ones(16 * 2**20)  # 64 MiB
        time.sleep(0.05)
        del scratch
        return Ran(torch.ones(2**20), "test")

    ran, peak_bytes = with_peak(run, CPU)
    assert 60 * 2**20 < peak_bytes < 90 * 2**20
    assert len(ran.out) == 2**20
    assert len(held) == 8 * 2**20


def test_growth_is_over_lengths_that_sparse_answered() -> None:
    def length(n: int, seconds: float, kind: str = "sparse") -> Length:
        return Length(n, n, (Row("sdpa", "sdpa", median_s=n * n), Row("sparse", kind, median_s=seconds)))

    found = growth([length(100, 1.0), length(200, 2.0), length(800, 32.0), length(1600, 1.0, "dense")])
    assert [(between.start, between.stop) for between in found] == [(100, 200), (200, 800)]
    assert [between.exponent for between in found] == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("density", [0.4, 0.7])
def test_the_antidiagonal_threshold_matches_the_density(density: float) -> None:
    inputs = inputs_of(SMALL, 2048)
    threshold = contenders.matching_threshold(inputs, density)
    chosen = antidiagonal.select(inputs.query, inputs.key, inputs.mask, 128, threshold)
    assert chosen.density == pytest.approx(density, abs=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where its compiler is imported
def test_a_kernel_that_does_not_compile_is_absent_with_its_reason() -> None:
    inputs = inputs_of(replace(SMALL, is_causal=False), 256)
    found = contenders._flex(replace(inputs, key=inputs.key[..., :8]))  # no kernel multiplies 16 with 8 channels
    assert isinstance(found, Absent)
    assert found.reason.startswith("did not compile: ")
    assert "\n" not in found.reason
    assert "head" in found.reason or "embedding" in found.reason


def test_a_fallback_breaks_the_line_of_its_chart() -> None:
    from benchmarks.plots import Chart, series

    def length(n: int, *, fallback: bool) -> Length:
        return Length(n, n, (Row("sparse", "", fallback=fallback, speedup=n / 100),))

    lengths = [length(100, fallback=False), length(200, fallback=True), length(400, fallback=False)]
    solid, crosses = series(Chart("speedup", "", lambda row: row.speedup, 2), lengths)
    assert (solid[0], crosses[0]) == ("sparse", "sparse, fell back")
    assert [None if isnan(y) else y for _, y in solid[3]] == [1.0, None, 4.0]
    assert [None if isnan(y) else y for _, y in crosses[3]] == [None, 2.0, None]
