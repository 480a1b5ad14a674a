"""A run, or a sweep, as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from loadtests import charts
from loadtests.figures import Totals, by_bucket, grouped
from loadtests.report import HEADER, bucket_label, client, reasons, rows, service
from loadtests.run import Run
from loadtests.samples import Sample
from loadtests.scenarios import SCENARIOS
from loadtests.sweep import Step, verdict
from loadtests.thresholds import Check, Seconds

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin: 2rem 0 .5rem } p { max-width: 60rem }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee }
th { border-bottom: 2px solid #888 } .words td, .words th { text-align: left }
td:first-child, th:first-child { text-align: left }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.figures div { background: #f5f6f8; border-radius: .4rem; padding: .5rem 1rem; min-width: 7rem }
.figures b { display: block; font-size: 1.4rem } .figures span { color: #666; font-size: .85rem }
.ok { color: #1a7f37 } .missed { color: #c62828; font-weight: 600 }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(34rem, 1fr)); gap: 1.4rem }
figure { margin: 0 } figcaption { font-weight: 600 } figcaption small { font-weight: 400; color: #666; display: block }
img { width: 100% }
"""
TENANT_HEADER = ("tenant", "offered/s", "in time/s", "in time", "refused", "failed", "p50", "p99", "device s")
SHARED = (
    "Client and service ran on the same cores and took time from each other, so latencies are higher than "
    "with a client on another machine."
)
OPEN = (
    "The load is an open loop: the time at which each request is due is drawn before the run, and its latency counts "
    "from that time, even if it was sent late."
)


def of_run(run: Run, checks: Sequence[Check], slo_s: Seconds, about: Mapping[str, str]) -> str:
    scenario = SCENARIOS[run.options.scenario]
    drawn = [
        (
            "Every answer",
            "when it was due and how long it took; a line ends when the answer came",
            charts.requests(run),
        ),
        ("Latency over time", "by length", charts.percentiles(run, slo_s)),
        ("Latency against offered load", "by length", charts.against_load(run, slo_s)),
        ("Goodput", "outcome of the requests, by when they were due", charts.goodput(run, slo_s)),
        ("Queue", "as predicted by the service, and as seen by the client", charts.queue(run)),
        ("Batches", "work per run of the device", charts.batches(run)),
        ("Plans", "attention plan of the answers", charts.plans(run)),
        ("Cost", "device time used, at the configured price", charts.cost(run, slo_s)),
        ("Cores", "shows whether the client was the bottleneck", charts.cores(run)),
        ("Memory and replicas", "", charts.memory(run)),
    ]
    totals, client_load = Totals.of(run.samples, slo_s), client(run)
    figures = {
        "offered": f"{run.offered_per_s:.1f}/s",
        "answered in time": f"{totals.good / run.duration_s:.1f}/s",
        "in time, of all": f"{totals.share('good'):.1%}",
        "p50": _seconds(totals.p50_s),
        "p99": _seconds(totals.p99_s),
        "refused": f"{totals.refused:,}",
        "failed": f"{totals.failed:,}",
        "per 1,000 answers": f"{totals.usd_per_1000:.2g} USD",
        "longest queue": _seconds(service(run)["queue_max_s"]),
        "client": f"{client_load['cores_mean']:.2f} cores",
    }
    tiles = "".join(f"<div><b>{seen}</b><span>{name}</span></div>" for name, seen in figures.items())
    body = [
        f"<h1>Load test: {escape(run.options.scenario)}</h1><p>{escape(scenario.about.capitalize())}. {_how(run)}</p>",
        f'<div class="figures">{tiles}</div>',
        _checks(checks),
        "<main>" + "".join(_figure(*chart) for chart in drawn) + "</main>",
        "<h2>By endpoint, length and plan</h2>" + _table(HEADER, rows(run.samples)),
    ]
    if tenants := grouped((sample for sample in run.samples if sample.tenant), lambda sample: sample.tenant):
        lines = [_tenant(name, group, run.duration_s, slo_s) for name, group in tenants.items()]
        body.append("<h2>By tenant</h2>" + _table(TENANT_HEADER, lines))
    if failures := reasons(run.samples):
        body.append("<h2>Failures</h2>" + _table(("times", "reason"), [(f"{n}", why) for why, n in failures], "words"))
    return _page(f"Load test: {run.options.scenario}", "".join(body), about)


def of_sweep(steps: Sequence[Step], slo_s: Seconds, about: Mapping[str, str]) -> str:
    drawn = [
        ("Latency against offered load", "by length", charts.sweep_latencies(steps, slo_s)),
        ("Goodput against offered load", "", charts.sweep_goodput(steps, slo_s)),
    ]
    name, result = steps[0].run.options.scenario, escape(verdict(steps).capitalize())
    head = "offered/s", "in time/s", "in time", "refused", "failed", "p50", "p99", "service cores", "client cores"
    ordered = sorted(steps, key=lambda step: step.run.offered_per_s)
    body = [
        f"<h1>Saturation sweep: {escape(name)}</h1>",
        f"<p><b>{result}.</b> {escape(SCENARIOS[name].about.capitalize())}. {_how(steps[0].run)}</p>",
        "<main>" + "".join(_figure(*chart) for chart in drawn) + "</main>",
        "<h2>Steps</h2>" + _table((*head, "missed"), [_step(step, slo_s) for step in ordered]),
        "<h2>By length</h2>",
        _table(
            ("tokens, offered/s", "answers", "p50", "p99"),
            [row for step in ordered for row in _lengths(step.run, slo_s)],
        ),
    ]
    return _page(f"Saturation sweep: {name}", "".join(body), about)


def png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, dpi=130)
    return target.getvalue()


def _how(run: Run) -> str:
    """How the load was measured; a service that was not started here may run on another machine."""
    return OPEN if math.isnan(service(run)["cores_mean"]) else f"{SHARED} {OPEN}"


def _tenant(name: str, samples: Sequence[Sample], duration_s: float, slo_s: Seconds) -> tuple[str, ...]:
    totals = Totals.of(samples, slo_s)
    per_s = f"{totals.offered / duration_s:.1f}", f"{totals.good / duration_s:.1f}", f"{totals.share('good'):.1%}"
    times = _seconds(totals.p50_s), _seconds(totals.p99_s)
    return (name, *per_s, f"{totals.refused:,}", f"{totals.failed:,}", *times, f"{totals.device_s:.2f}")


def _step(step: Step, slo_s: Seconds) -> tuple[str, ...]:
    run, totals = step.run, Totals.of(step.run.samples, slo_s)
    share = f"{totals.share('good'):.1%}"
    counts = f"{totals.refused:,}", f"{totals.failed:,}", _seconds(totals.p50_s), _seconds(totals.p99_s)
    cores = (f"{side['cores_mean']:.2f}" for side in (service(run), client(run)))
    rates = f"{run.offered_per_s:.1f}", f"{totals.good / run.duration_s:.1f}"
    return (*rates, share, *counts, *cores, "; ".join(step.missed) or "none")


def _lengths(run: Run, slo_s: Seconds) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, group in by_bucket(run.samples).items():
        totals = Totals.of(group, slo_s)
        label = f"{bucket_label(name)}, {run.offered_per_s:.1f}/s"
        found.append((label, f"{totals.answered:,}", _seconds(totals.p50_s), _seconds(totals.p99_s)))
    return found


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return "<p>No thresholds for this load.</p>"
    missed = sum(not check.passed for check in checks)
    verdict = (
        f'<span class="missed">{missed} of {len(checks)} missed</span>' if missed else '<span class="ok">met</span>'
    )
    lines = (
        f"<tr><td>{escape(check.name)}</td><td>{check.value:.4g}</td>"
        f"<td>{'at least' if check.at_least else 'at most'} {check.limit:g}</td>"
        f"<td>{'<span class=ok>ok</span>' if check.passed else '<span class=missed>missed</span>'}</td></tr>"
        for check in checks
    )
    head = "<tr><th>threshold</th><th>measured</th><th>allowed</th><th></th></tr>"
    note = "Limits that this load must meet to pass. Goodput counts answers within the SLO of their length."
    return f"<h2>Thresholds: {verdict}</h2><p>{note}</p><table>{head}{''.join(lines)}</table>"


def _figure(title: str, note: str, figure: Figure) -> str:
    image = base64.b64encode(png(figure)).decode()
    caption = f"<figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
    return f'<figure>{caption}<img alt="{escape(title)}" src="data:image/png;base64,{image}"></figure>'


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<table class="{kind}"><tr>{first}</tr>{rest}</table>'


def _seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _page(title: str, body: str, about: Mapping[str, Any]) -> str:
    where = _table(("", ""), [(name, str(value)) for name, value in about.items()], "words")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n<h2>Environment</h2>{where}</body></html>\n"
    )
