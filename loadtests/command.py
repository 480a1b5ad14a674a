"""`python -m loadtests`: runs a scenario or a sweep, compares it with thresholds, and writes page, samples and JSON."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import document
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

MAX_STEPS = 8  # of a sweep


@dataclass(frozen=True, slots=True)
class Target:
    """The service to load. Without a URL, a service is started on the 300 ports from `first_port`."""

    url: str | None
    grpc_port: int | None
    metrics_port: int | None
    first_port: int

    @contextmanager
    def service(self, scenario: str) -> Iterator[Service]:
        if self.url is not None:
            if SCENARIOS[scenario].event or SCENARIOS[scenario].settings:
                raise ValueError(
                    f"scenario {scenario} needs its own service, because of its settings or its event; omit --url"
                )
            yield running(self.url, self.grpc_port, self.metrics_port)
        else:
            with started(SCENARIOS[scenario], self.first_port) as service:
                yield service


@dataclass(frozen=True, slots=True)
class Result:
    """`text`: for a terminal; `line`: one JSON line; `files`: the written files."""

    passed: bool
    text: str
    line: str
    files: tuple[Path, ...]


def run_scenario(
    options: Options, target: Target, limits: Path, directory: Path, progress: Callable[[str], None]
) -> Result:
    """Run a scenario and compare it with `limits`, a file of thresholds; of a trace only the failures count.

    Raises ValueError, OSError, Unavailable or ClientFailed with the reason.
    """
    known = thresholds.read(limits)
    _check(options)
    progress("starting")
    with handling(signal.default_int_handler), target.service(options.scenario) as service:
        found = run(options, service, progress)
    own = _limits(options, known)
    checks = thresholds.judge(found.samples, own, known.slo_s)
    checks += thresholds.judge_memory(report.service(found)["resident_growth"], found.duration_s, own)
    summary = report.summary(found, checks, known.slo_s)
    name = options.scenario
    html, chart = page.of_run(found, checks, known.slo_s, _about()), page.png(charts.requests(found))
    written = _write(directory, name, summary, html, chart, [found])
    return Result(summary["passed"], report.text(found, checks, known.slo_s), json.dumps(summary), written)


def run_sweep(
    options: Options, target: Target, limits: Path, directory: Path, progress: Callable[[str], None]
) -> Result:
    """Find the highest load that meets the thresholds of `run_scenario`; passed if there is such a load.

    Raises ValueError, OSError, Unavailable or ClientFailed with the reason.
    """
    known = thresholds.read(limits)
    own = _limits(options, known)
    _check(options)
    progress("starting")
    with handling(signal.default_int_handler), target.service(options.scenario) as service:

        def measure(scale: float) -> Step:
            progress(f"scale {scale:.2f}")
            scaled = replace(options, scale=scale)
            _check(scaled)
            return judged(run(scaled, service), own, known.slo_s)

        steps = list(sweep(measure, options.scale, MAX_STEPS))
    name, found = f"sweep-{options.scenario}", knee(steps)
    summary = {
        "scenario": options.scenario,
        "knee": None if found is None else _step(found, known),
        "steps": [_step(step, known) for step in sorted(steps, key=lambda step: step.scale)],
    }
    html, chart = page.of_sweep(steps, known.slo_s, _about()), page.png(charts.sweep_latencies(steps, known.slo_s))
    written = _write(directory, name, summary, html, chart, [step.run for step in steps])
    rows = [f"{step.run.offered_per_s:8.2f}/s {'; '.join(step.missed) or 'sustained'}" for step in steps]
    return Result(found is not None, "\n".join([*rows, verdict(steps)]), json.dumps(summary), written)


def _check(options: Options) -> None:
    """Check a trace before anything starts. Raises ValueError with the reason."""
    if options.trace is not None:
        planned = plan_of(options.trace, options.whole_s, options.scale)
        check_trace(planned, settings().max_request_bytes, psutil.virtual_memory().available)


def _limits(options: Options, known: Thresholds) -> Limits:
    """Limits of the scenario; a trace has none."""
    return known.scenarios.get(options.scenario, Limits()) if options.trace is None else Limits()


def _step(step: Step, known: Thresholds) -> dict[str, Any]:
    summary = report.summary(step.run, [], known.slo_s)
    left_out = ("checks", "passed", "happened", "slo_s", "scenario", "by_tenant")
    return {"missed": step.missed, **{name: value for name, value in summary.items() if name not in left_out}}


def _about() -> dict[str, str]:
    """Hardware, versions and command."""
    about = document({}, "loadtests")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return {"hardware": about["hardware"], "python": about["python"], "versions": versions, "command": about["command"]}


def _write(
    directory: Path, name: str, figures: dict[str, Any], html: str, chart: bytes, runs: Sequence[Run]
) -> tuple[Path, ...]:
    """Write all files and return their paths; samples of several runs are one file, in their order."""
    directory.mkdir(parents=True, exist_ok=True)
    files = tuple(directory / f"{name}.{ending}" for ending in ("html", "png", "json", "ndjson"))
    files[0].write_text(html)
    files[1].write_bytes(chart)
    files[2].write_text(json.dumps(document(figures, "loadtests"), indent=1) + "\n")
    samples.write(files[3], [sample for run in runs for sample in run.samples])
    return files
