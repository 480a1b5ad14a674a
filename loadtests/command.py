"""`python -m loadtests`: a scenario or a sweep, judged, and written as page, samples and JSON."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command import document
from benchmarks.servers.process import handling
from loadtests import charts, page, report, samples, thresholds
from loadtests.mix import plan_of
from loadtests.payloads import check_trace
from loadtests.run import Options, Run, run
from loadtests.scenarios import SCENARIOS
from loadtests.sweep import Step, judged, knee, sweep, verdict
from loadtests.target import Service, running, started
from loadtests.thresholds import Limits, Thresholds
from service.commands.terminal import settings

MOST_STEPS = 8  # of a sweep


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes. Without a URL a service is started on 300 ports from `first_port`."""

    url: str | None
    grpc_port: int | None
    metrics_port: int | None
    first_port: int

    @contextmanager
    def service(self, scenario: str) -> Iterator[Service]:
        if self.url is not None:
            if SCENARIOS[scenario].event or SCENARIOS[scenario].settings:
                raise ValueError(f"{scenario} needs a service of its own, for its settings and what happens to it")
            yield running(self.url, self.grpc_port, self.metrics_port)
        else:
            with started(SCENARIOS[scenario], self.first_port) as service:
                yield service


@dataclass(frozen=True, slots=True)
class Result:
    """`told`: for a terminal; `line`: one JSON line; `files`: what was written."""

    passed: bool
    told: str
    line: str
    files: tuple[Path, ...]


def one(options: Options, target: Target, limits: Path, directory: Path, step: Callable[[str], None]) -> Result:
    """Runs a scenario and judges it by `limits`, a file of thresholds; a trace is judged only by its failures."""
    known = thresholds.read(limits)
    _check(options)
    step("starting")
    with handling(signal.default_int_handler), target.service(options.scenario) as service:
        found = run(options, service, step)
    own = _limits(options, known)
    checks = thresholds.judge(found.samples, own, known.slo_s)
    checks += thresholds.judge_memory(report.service(found)["resident_growth"], found.duration_s, own)
    summary = report.summary(found, checks, known.slo_s)
    name = options.scenario
    html, chart = page.of_run(found, checks, known.slo_s, _about()), page.png(charts.requests(found))
    written = _write(directory, name, summary, html, chart, [found])
    return Result(summary["passed"], report.text(found, checks, known.slo_s), json.dumps(summary), written)


def saturation(options: Options, target: Target, limits: Path, directory: Path, step: Callable[[str], None]) -> Result:
    """Finds the highest load that keeps the thresholds of `one`; passed where there is one."""
    known = thresholds.read(limits)
    own = _limits(options, known)
    _check(options)
    step("starting")
    with handling(signal.default_int_handler), target.service(options.scenario) as service:

        def measure(scale: float) -> Step:
            step(f"scale {scale:.2f}")
            scaled = replace(options, scale=scale)
            _check(scaled)
            return judged(run(scaled, service), own, known.slo_s)

        steps = list(sweep(measure, options.scale, MOST_STEPS))
    name, found = f"sweep-{options.scenario}", knee(steps)
    summary = {
        "scenario": options.scenario,
        "knee": None if found is None else _step(found, known),
        "steps": [_step(each, known) for each in sorted(steps, key=lambda each: each.scale)],
    }
    html, chart = page.of_sweep(steps, known.slo_s, _about()), page.png(charts.sweep_latencies(steps, known.slo_s))
    written = _write(directory, name, summary, html, chart, [each.run for each in steps])
    rows = [f"{each.run.offered_per_s:8.2f}/s {'; '.join(each.missed) or 'sustained'}" for each in steps]
    return Result(found is not None, "\n".join([*rows, verdict(steps)]), json.dumps(summary), written)


def _check(options: Options) -> None:
    """Of a trace, before anything starts. ValueError says what is wrong with it."""
    if options.trace is not None:
        planned = plan_of(options.trace, options.whole_s, options.scale)
        check_trace(planned, settings().max_request_bytes, psutil.virtual_memory().available)


def _limits(options: Options, known: Thresholds) -> Limits:
    """Those of the scenario; a trace has none."""
    return known.scenarios.get(options.scenario, Limits()) if options.trace is None else Limits()


def _step(each: Step, known: Thresholds) -> dict[str, Any]:
    summary = report.summary(each.run, [], known.slo_s)
    left_out = ("checks", "passed", "happened", "slo_s", "scenario", "by_tenant")
    return {"missed": each.missed, **{name: value for name, value in summary.items() if name not in left_out}}


def _about() -> dict[str, str]:
    """Of this machine and command."""
    told = document({}, "loadtests")
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return {"hardware": told["hardware"], "python": told["python"], "versions": versions, "command": told["command"]}


def _write(
    directory: Path, name: str, figures: dict[str, Any], html: str, chart: bytes, runs: Sequence[Run]
) -> tuple[Path, ...]:
    """The samples of several runs are one file, in their order."""
    directory.mkdir(parents=True, exist_ok=True)
    files = tuple(directory / f"{name}.{ending}" for ending in ("html", "png", "json", "ndjson"))
    files[0].write_text(html)
    files[1].write_bytes(chart)
    files[2].write_text(json.dumps(document(figures, "loadtests"), indent=1) + "\n")
    samples.write(files[3], [one for each in runs for one in each.samples])
    return files
