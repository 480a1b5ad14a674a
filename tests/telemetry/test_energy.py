"""Joules: counters as the machine shows them, whose they are under nested runs, and that none is lost or invented."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from service.core.answer import Answer
from service.engine.engine import Engine
from service.engine.job import AnswerSink, Job
from service.engine.runner import BatchRunner
from service.engine.workloads.base import Outcome
from service.engine.workloads.forward import ForwardWorkload
from service.telemetry import energy
from service.telemetry.energy import Energy, NoMeter, Nvml, Rapl, carbon_g, meter_for, nvml_meter, rapl_zones
from tests.engine.test_engine import attention, embed, run
from tests.engine.test_slicing import beside
from tests.engines import record_of
from tests.telemetry.followed import engine_like, post

# -- RAPL -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two sockets, the cores of one of them, and the whole platform, as Linux shows them."""
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000\n")
        (tmp_path / zone / "energy_uj").write_text("900000\n")
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_are_summed_and_what_is_inside_of_them_is_not(powercap: Path) -> None:
    meter = Rapl(rapl_zones(powercap))
    assert meter.read_j() == 0
    for zone in ("intel-rapl:0:0", "intel-rapl:2"):
        (powercap / zone / "energy_uj").write_text("999999\n")
    assert meter.read_j() == 0
    (powercap / "intel-rapl:0/energy_uj").write_text("950000\n")
    (powercap / "intel-rapl:1/energy_uj").write_text("900001\n")
    assert meter.read_j() == pytest.approx(0.050001)


def test_a_counter_that_wraps_around_goes_on(powercap: Path) -> None:
    meter = Rapl(rapl_zones(powercap))
    for _ in range(3):
        (powercap / "intel-rapl:0/energy_uj").write_text("100000\n")
        meter.read_j()
        (powercap / "intel-rapl:0/energy_uj").write_text("900000\n")
        meter.read_j()
    assert meter.read_j() == pytest.approx(3.0)


def test_what_cannot_be_read_is_not_measured(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "rapl_zones", lambda: rapl_zones(powercap))
    assert isinstance(meter_for(torch.device("cpu")), Rapl)
    (powercap / "intel-rapl:1/energy_uj").unlink()  # one socket alone would be half the truth
    assert meter_for(torch.device("cpu")) is None
    (powercap / "intel-rapl:1/energy_uj").write_text("not a number")
    assert meter_for(torch.device("cpu")) is None
    monkeypatch.setattr(energy, "rapl_zones", lambda: rapl_zones(powercap / "nothing"))
    assert meter_for(torch.device("cpu")) is None


def test_a_counter_that_fails_later_ends_the_measurement(powercap: Path) -> None:
    account = Energy(Rapl(rapl_zones(powercap)))
    account.begin()
    (powercap / "intel-rapl:0/energy_uj").write_text("")
    assert account.end() is None
    assert account.idle_j is None
    (powercap / "intel-rapl:0/energy_uj").write_text("950000\n")
    account.begin()
    assert account.end() is None


# -- NVML: which GPU it is ------------------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two GPUs; the second is divided, and its part has a UUID that NVML does not take for a GPU's."""

    class NVMLError(Exception):
        pass

    fake: Any = ModuleType("pynvml")
    fake.NVMLError, fake.milli = NVMLError, {"first": 5000, "second": 7000}
    known = {"GPU-aaaa": "first", "00000000:41:00.0": "first", "GPU-bbbb": "second", "00000000:c1:00.0": "second"}

    def found(name: str) -> str:
        if name not in known:
            raise NVMLError("Not Found")
        return known[name]

    def total(handle: str) -> int:
        if handle not in fake.milli:
            raise NVMLError("Not Supported")
        return int(fake.milli[handle])

    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = fake.nvmlDeviceGetHandleByPciBusId = found
    fake.nvmlDeviceGetMigMode = lambda handle: [handle == "second", False]
    fake.nvmlDeviceGetTotalEnergyConsumption = total
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_a_gpu_is_found_by_what_it_is_not_by_its_place(nvml: Any) -> None:
    assert nvml_meter("aaaa", "00000000:41:00.0").read_j() == 5.0
    assert nvml_meter("GPU-aaaa", "").read_j() == 5.0
    assert nvml_meter("unknown", "00000000:41:00.0").read_j() == 5.0


@pytest.mark.parametrize("uuid", ["bbbb", "a-part-of-it"])
def test_a_part_of_a_gpu_does_not_use_the_whole_gpus_counter(nvml: Any, uuid: str) -> None:
    with pytest.raises(NoMeter, match="divided"):
        nvml_meter(uuid, "00000000:c1:00.0")


def test_a_gpu_without_a_counter_or_name_has_no_meter(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoMeter, match="Not Found"):
        nvml_meter("unknown", "unknown")
    nvml.milli.clear()
    with pytest.raises(NoMeter, match="Not Supported"):
        nvml_meter("aaaa", "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoMeter, match="nvidia-ml-py is not installed"):
        nvml_meter("aaaa", "")


def test_the_counter_is_read_as_rarely_as_it_is_worth(nvml: Any) -> None:
    now = [10.0]
    meter = Nvml(nvml, "first", lambda: now[0])
    assert meter.read_j() == 5.0
    nvml.milli["first"] = 6000
    now[0] += 0.004
    assert meter.read_j() == 5.0
    now[0] += 0.002
    assert meter.read_j() == 6.0


# -- whose the joules are -------------------------------------------------------------------------------------------


class Ticking:
    """One joule more at every look, and what is added."""

    def __init__(self) -> None:
        self.joules = 100.0

    def read_j(self) -> float:
        self.joules += 1.0
        return self.joules


def test_a_nested_run_has_its_own_and_nothing_is_lost() -> None:
    meter = Ticking()
    account = Energy(meter)
    start_j = meter.joules
    meter.joules += 3  # idle
    account.begin()
    meter.joules += 10  # outer
    account.begin()
    meter.joules += 20  # inner
    inner_j = account.end()
    meter.joules += 30  # outer again
    outer_j = account.end()
    meter.joules += 5
    idle_j = account.idle_j
    assert (inner_j, outer_j, idle_j) == (21, 42, 10)
    assert inner_j + outer_j + idle_j == meter.joules - start_j


class Watts:
    """A device of constant power, by the engine's own clock."""

    def __init__(self, clock: Callable[[], float], watts: float = 250.0) -> None:
        self._clock, self._watts = clock, watts

    def read_j(self) -> float:
        self.last_j = self._clock() * self._watts
        return self.last_j


def test_requests_and_idle_time_add_up_to_the_counter(engine: Engine) -> None:
    meter = Watts(engine.clock)
    with engine_like(engine, meter=meter, batch_budget_s=0.01, carbon_g_per_kwh=400.0) as other:
        assert other.energy is not None
        start_j = meter.last_j
        _, answers = run(beside(other, attention(8192, 1, heads=8, mode="chunked"), attention(16, 3), attention(64, 2)))
        answers += [run(other.submit(embed("a text", "another one")))]
        idle_j = other.energy.idle_j
    joules = [answer.usage.joules for answer in answers]
    assert sum(joules) + idle_j == pytest.approx(meter.last_j - start_j, rel=1e-9)
    assert answers[0].timing.paused_s > 0
    for answer in answers:  # at constant power energy goes like time, pauses left out
        assert answer.usage.joules == pytest.approx(250 * answer.usage.device_s, rel=0.05, abs=0.25)
        assert answer.usage.carbon_g == pytest.approx(answer.usage.joules / 3.6e6 * 400)


def test_a_batch_shares_its_energy_by_work(engine: Engine) -> None:
    async def together(other: Engine) -> list[Answer]:
        return list(await asyncio.gather(*(other.submit(embed("word " * (5 + 40 * one))) for one in range(4))))

    meter = Watts(engine.clock)
    with engine_like(engine, meter=meter) as other:
        answers = run(together(other))
    assert max(answer.batch_requests for answer in answers) > 1
    for answer in answers:
        assert answer.usage.joules == pytest.approx(250 * answer.usage.device_s, rel=0.05, abs=0.25)
    assert answers[3].usage.joules > answers[2].usage.joules


def test_failed_runs_are_paid_like_their_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ForwardWorkload.run

    def poisoned(self: ForwardWorkload, works: Any, checkpoint: Any) -> list[Outcome]:
        outcomes = original(self, works, checkpoint)
        if any(work.prepared.request.texts == ("bad",) for work in works):  # type: ignore[union-attr]
            raise ValueError("secret")
        return outcomes

    async def jobs() -> list[Job]:
        requests = [embed("first"), embed("bad"), embed("second")]
        deadline_s = engine.clock() + 60
        now_s, plan = engine.clock(), engine.pricing.plan
        planned = [await plan(request, now_s, deadline_s, record_of(request)) for request in requests]
        return [Job(each, AnswerSink()) for each in planned]

    monkeypatch.setattr(ForwardWorkload, "run", poisoned)
    meter = Watts(engine.clock)
    account = Energy(meter)
    start_j = meter.last_j
    results = BatchRunner(torch.device("cpu"), engine.clock, account).run(run(jobs()))
    assert [isinstance(one.outcome, Exception) for one in results] == [False, True, False]
    for one in results:
        assert one.stats.joules == pytest.approx(250 * one.stats.device_s, rel=0.05, abs=0.25)
        assert [ran.is_failed for ran in one.stats.runs] == [True, isinstance(one.outcome, Exception)]
    used_j = sum(one.stats.joules or 0.0 for one in results)
    assert used_j + (account.idle_j or 0.0) == pytest.approx(meter.last_j - start_j, rel=1e-9)


def test_joules_are_reported_only_if_they_are_measured(engine: Engine) -> None:
    unmeasured = post(engine, "/v1/attention")
    assert "x-energy-joules" not in unmeasured.headers
    assert not {"joules", "carbon_g"} & set(unmeasured.json()["usage"])
    with engine_like(engine, meter=Watts(engine.clock)) as other:
        measured = post(other, "/v1/attention")
    joules = measured.json()["usage"]["joules"]
    assert float(measured.headers["x-energy-joules"]) == pytest.approx(joules, abs=1e-6)
    assert joules > 0
    assert "carbon_g" not in measured.json()["usage"]
    assert carbon_g(3.6e6, 400.0) == 400.0
    assert carbon_g(None, 400.0) is None
