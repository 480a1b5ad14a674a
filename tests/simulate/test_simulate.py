"""Traces, clusters and their figures, without a clock."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.main import app
from service.config import Config
from service.core.options import Priority
from service.simulate import report, traces
from service.simulate.cluster import Arrival, simulate
from service.simulate.traces import Entry


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = list(traces.draw("bursts", 10.0, 200, "m", seed=3))
    traces.write(tmp_path / "trace.csv", trace)
    assert list(traces.read(tmp_path / "trace.csv")) == trace


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("at_s,tokens\n1,x\n", "line 2"),
        ("at_s\n1\n", "line 2: 'tokens'"),
        ("at_s,tokens\n2,1\n1,1\n", "line 3: expected at_s of at least 2 and positive tokens, got 1 and 1"),
        ("at_s,tokens\n2,0\n", "line 2: expected at_s of at least 0 and positive tokens, got 2 and 0"),
        ("at_s,tokens,priority\n2,1,high\n", "line 2"),
        ("at_s,tokens\nnan,1\n", "line 2"),
    ],
)
def test_a_broken_trace_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        list(traces.read(path))


@pytest.mark.parametrize("kind", traces.KINDS)
def test_drawn_traces_have_the_rate_that_was_asked_for(kind: str) -> None:
    rate = 30_000 / (2 * 86_400) if kind == "diurnal" else 50.0  # two days, or some minutes
    trace = list(traces.draw(kind, rate, 30_000, "m", seed=1))
    assert trace == list(traces.draw(kind, rate, 30_000, "m", seed=1))
    assert len(trace) / trace[-1].at_s == pytest.approx(rate, rel=0.1)
    assert {one.tenant for one in trace} == {"free", "team", "enterprise"}


def even(count: int, gap_s: float, predicted_s: float) -> list[Arrival]:
    return [Arrival(index * gap_s, predicted_s, key=index) for index in range(count)]


def test_an_idle_cluster_answers_in_the_predicted_time() -> None:
    trace = even(100, 1.0, 0.1)
    cluster = simulate(trace, 1, Config())
    found = report.simulation_row(trace, cluster, Config(price_per_device_hour_usd=36.0))
    assert (found.short_p50_s, found.short_p99_s) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.used == pytest.approx(10.0 / 99.1)
    assert found.used_usd == pytest.approx(0.01 * 10.0)
    assert found.allocated_usd == pytest.approx(0.01 * 99.1)
    assert (found.refused, found.fairness) == (0.0, 1.0)


def test_two_replicas_do_twice_the_work() -> None:
    config = Config(max_queue_s=2.0)
    refused = []
    for replicas in (1, 2, 4):
        trace = even(4000, 0.05, 0.1)  # twice what one can do
        refused.append(report.simulation_row(trace, simulate(trace, replicas, config), config).refused)
    assert refused[0] == pytest.approx(0.5, abs=0.03)
    assert refused[1:] == [pytest.approx(0.0, abs=0.01), 0.0]


def test_retry_after_is_right_under_steady_overload() -> None:
    """Twice what the device can do, for five minutes, of lengths that differ by twenty times."""
    generator = random.Random(2)
    config, now_s, trace = Config(max_queue_s=10.0), 0.0, []
    while now_s < 300:
        now_s += generator.expovariate(2 / 0.05)
        trace.append(Arrival(now_s, min(0.19, max(0.01, generator.expovariate(1 / 0.05))), key=len(trace)))
    cluster = simulate(trace, 1, config)
    right, told, taken_s = 0, 0, math.inf
    for one in reversed(trace):
        if one.refused is None:
            taken_s = one.arrived_s  # the queue was open again
        elif one.retry_after_s is not None and taken_s < math.inf:
            told += 1
            right += 0.5 <= one.retry_after_s / (taken_s - one.arrived_s) <= 2
    assert told > 1000
    assert right / told >= 0.8
    assert cluster[0].busy_s / now_s > 0.95  # the device never ran out of work for that


def test_members_of_a_batch_pay_its_fixed_part_once() -> None:
    trace = [Arrival(0.0, 0.012, key="m", shared_s=0.01) for _ in range(10)]
    cluster = simulate(trace, 1, Config())
    assert cluster[0].busy_s == pytest.approx(2 * 0.01 + 10 * 0.002)  # the first came to an idle device


def test_long_work_gives_way_and_ends() -> None:
    trace = [Arrival(0.0, 10.0, key="long"), *(Arrival(1.0 + index, 0.01, key=index) for index in range(5))]
    simulate(trace, 1, Config())
    assert max(one.latency_s for one in trace[1:]) <= 0.06
    assert trace[0].latency_s == pytest.approx(10.05)


def test_tenants_that_wait_unequally_are_unfair() -> None:
    answered = [Arrival(0.0, 1.0, tenant="a", finished_s=1.0), Arrival(0.0, 1.0, tenant="b", finished_s=9.0)]
    assert report.jain_index(answered) == pytest.approx(100 / (2 * 82))


def test_the_command_prints_one_row_for_each_size(tmp_path: Path) -> None:
    path, output = tmp_path / "trace.csv", tmp_path / "out.json"
    traces.write(path, [Entry(0.1 * at, 4096, priority=Priority.BATCH) for at in range(20)])
    arguments = ["simulate", "--trace", str(path), "--replicas", "1,3", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "20 requests" in result.output
    assert [row["replicas"] for row in json.loads(output.read_text())] == [1, 3]


def test_what_can_never_fit_is_refused_and_the_rest_runs(tmp_path: Path) -> None:
    path, output = tmp_path / "trace.csv", tmp_path / "out.json"
    traces.write(path, [Entry(0.0, 500_000_000), Entry(1.0, 256)])
    arguments = ["simulate", "--trace", str(path), "--replicas", "1", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())[0]["refused"] == 0.5


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    for arguments, says in (
        (["--kind", "sometimes"], "kind: expected one of poisson, bursts, heavy, diurnal, got 'sometimes'"),
        (["--replicas", "0"], "at least 1"),
        (["--trace", str(tmp_path / "none.csv")], "none.csv"),
    ):
        result = CliRunner().invoke(app, ["simulate", "--requests", "3", *arguments])
        assert result.exit_code == 1
        assert says in result.output.replace("\n", "")
