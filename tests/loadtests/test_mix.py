"""What is planned: lengths that follow their distribution, endpoints their weights, streams their own draws."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from loadtests.mix import BOOK, MAX_TOKENS, MAX_WORDS, MIN_TOKENS, Endpoint, Planned, Stream, lengths, plan, plan_of
from loadtests.run import Options
from loadtests.scenarios import SCENARIOS, key_of
from loadtests.thresholds import DEFAULT, read
from service.billing.tenants import key_hash
from service.config import Config

WEIGHTS = {Endpoint.EMBEDDINGS: 3.0, Endpoint.ATTENTION: 1.0}


def test_log_uniform_lengths_leave_no_part_out() -> None:
    drawn = lengths("log-uniform", 1, 700)
    assert drawn == lengths("log-uniform", 1, 700) == sorted(drawn)
    assert drawn != lengths("log-uniform", 2, 700)
    assert all(MIN_TOKENS <= length <= MAX_TOKENS for length in drawn)
    octaves = Counter(math.floor(math.log2(length / MIN_TOKENS)) for length in drawn)
    assert all(98 <= octaves[octave] <= 102 for octave in range(7))


def test_lognormal_lengths_have_their_median_and_end() -> None:
    drawn = lengths("lognormal", 1, 999)
    assert drawn[499] == pytest.approx(math.exp(6.2), rel=0.02)
    assert max(drawn) == MAX_TOKENS


def test_one_in_ten_of_the_bimodal_is_a_book() -> None:
    drawn = lengths("bimodal", 1, 1000)
    chat, books = [length for length in drawn if length < BOOK[0]], [length for length in drawn if length >= BOOK[0]]
    assert len(books) == pytest.approx(100, abs=2)
    assert chat[len(chat) // 2] == pytest.approx(math.exp(5.0), rel=0.02)
    assert max(books) <= BOOK[1]


def test_a_plan_follows_weights_and_seed() -> None:
    stream = Stream(100.0, WEIGHTS, tenant="one")
    planned = plan([stream], 60.0, seed=1)
    assert planned == plan([stream], 60.0, seed=1) != plan([stream], 60.0, seed=2)
    counts = Counter(request.endpoint for request in planned)
    assert counts[Endpoint.EMBEDDINGS] / len(planned) == pytest.approx(0.75, abs=0.03)
    assert {request.tenant for request in planned} == {"one"}
    assert max(request.length for request in planned if request.endpoint is Endpoint.EMBEDDINGS) <= MAX_WORDS
    assert len(plan([stream], 60.0, 1, scale=2)) == pytest.approx(2 * len(planned), rel=0.05)


def test_streams_do_not_disturb_each_other_and_are_in_order() -> None:
    first, second = Stream(20.0, WEIGHTS, tenant="a"), Stream(30.0, WEIGHTS, tenant="b")
    both = plan([first, second], 20.0, seed=1)
    assert [request.at_s for request in both] == sorted(request.at_s for request in both)
    assert [request for request in both if request.tenant == "a"] == plan([first], 20.0, seed=1)


def test_a_trace_is_played_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,tokens,model,tenant\n0.5,100,mini,free\n1.5,5000,,default\n2.5,5000,,\n9.0,7,mini,free\n")
    planned = plan_of(path, 5.0)
    assert [(request.at_s, request.endpoint, request.tenant) for request in planned] == [
        (0.5, Endpoint.EMBEDDINGS, "free"),
        (1.5, Endpoint.INFER, ""),
        (2.5, Endpoint.ATTENTION, ""),
    ]
    assert [request.length for request in planned] == pytest.approx([100, 5000, 5000], rel=0.03)
    assert [request.at_s for request in plan_of(path, 5.0, scale=2)] == [0.25, 0.75, 1.25, 4.5]
    assert Options(trace=path, scale=2.0).whole_s == 4.5  # not the scenario's
    assert Options(trace=path, duration_s=3.0).whole_s == 3.0
    with pytest.raises(ValueError, match=r"no requests within 0\.1 s"):
        plan_of(path, 0.1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_requests_and_limits(name: str) -> None:
    scenario = SCENARIOS[name]
    planned: list[Planned] = plan(scenario.streams, scenario.duration_s, 0)
    assert len(planned) > 60
    limits = read(DEFAULT).scenarios[name]
    assert {request.tenant for request in planned} - {""} >= set(limits.tenants)


def test_the_services_of_scenarios_can_be_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for scenario in SCENARIOS.values():
        for name, value in scenario.settings.items():
            monkeypatch.setenv(name, value)
    tenants = Config().tenants
    assert [tenant.key_sha256 for tenant in tenants] == [(key_hash(key_of(tenant.name)),) for tenant in tenants]
    assert len(tenants) == 2
