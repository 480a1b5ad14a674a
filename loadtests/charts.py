"""Charts of a run and of a sweep. Colours are lengths; dashed lines are medians, solid lines p99. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loadtests.figures import BUCKET_NAMES, Totals, by_bucket, by_load, in_flight, latencies, percentile, windows
from loadtests.report import bucket_label
from loadtests.run import Run
from loadtests.samples import Outcome, Sample
from loadtests.sweep import Step, knee
from loadtests.thresholds import Seconds
from loadtests.watch import Moment

LENGTH_COLOURS = dict(zip(BUCKET_NAMES, ("#1f77b4", "#2ca02c", "#d95f02", "#c51b8a", "#54278f"), strict=True))
PLAN_COLOURS = {"dense": "tab:blue", "chunked": "tab:green", "sparse": "tab:red"}
GOOD, LATE, REFUSED, FAILED = "#2ca02c", "#f2b134", "#9a9a9a", "#d62728"
PARTS = 24  # of the duration of a run
MIN_ANSWERS = 5  # for a percentile

Points = list[tuple[float, float]]


def requests(run: Run) -> Figure:
    """Latency of each answer, at the time when its request was due."""
    figure, axes = _figure("latency, s")
    for name, group in by_bucket(sample for sample in run.samples if sample.outcome is Outcome.ANSWERED).items():
        times, taken = [sample.at_s for sample in group], [sample.latency_s for sample in group]
        axes.plot(times, taken, ".", ms=4, alpha=0.6, color=LENGTH_COLOURS[name], label=f"{bucket_label(name)} tokens")
        axes.hlines(taken, times, [sample.ended_s for sample in group], color=LENGTH_COLOURS[name], lw=0.6, alpha=0.35)
    for outcome, colour, marker in ((Outcome.REFUSED, REFUSED, "|"), (Outcome.FAILED, FAILED, "x")):
        others = [sample for sample in run.samples if sample.outcome is outcome]
        if others:
            times, taken = [sample.at_s for sample in others], [sample.latency_s for sample in others]
            axes.plot(times, taken, marker, color=colour, ms=5, alpha=0.7, label=outcome.value)
    _seconds(axes)
    return _over_time(figure, axes, run)


def percentiles(run: Run, slo_s: Seconds) -> Figure:
    parts = windows(run.samples, run.duration_s, run.duration_s / PARTS * 2)
    figure, axes = _figure("latency, s")
    _latencies(axes, parts, slo_s)
    return _over_time(figure, axes, run)


def against_load(run: Run, slo_s: Seconds) -> Figure:
    """Latency within one run, by the load offered at that time."""
    figure, axes = _figure("latency, s")
    _latencies(axes, by_load(run.samples, run.duration_s), slo_s)
    axes.set_xlabel("offered requests/s, in equal parts of the run sorted by it")
    return figure


def goodput(run: Run, slo_s: Seconds) -> Figure:
    width_s = run.duration_s / PARTS
    parts = windows(run.samples, run.duration_s, width_s)
    totals = [Totals.of(part, slo_s) for _, part in parts]
    stacks = (
        ("answered in time", GOOD, [part.good for part in totals]),
        ("answered late", LATE, [part.answered - part.good for part in totals]),
        ("refused (429)", REFUSED, [part.refused for part in totals]),
        ("failed", FAILED, [part.failed for part in totals]),
    )
    figure, axes = _figure("requests/s, by when they were due")
    bottom = [0.0] * len(parts)
    for label, colour, counts in stacks:
        heights = [count / width_s for count in counts]
        if any(heights):
            axes.bar([at_s for at_s, _ in parts], heights, width_s * 0.92, bottom, color=colour, label=label)
        bottom = [low + more for low, more in zip(bottom, heights, strict=True)]
    return _over_time(figure, axes, run)


def queue(run: Run) -> Figure:
    figure, axes = _figure("predicted device seconds that wait")
    _moments(axes, run.moments, lambda moment: moment.queue_s, "queue (left)", "tab:purple")
    right = _right(axes)
    last_s = max((sample.ended_s for sample in run.samples), default=run.duration_s)
    times = [last_s * index / 200 for index in range(201)]
    right.step(times, in_flight(run.samples, times), color="0.6", lw=1, where="post", label="in flight (right)")
    right.set_ylabel("requests in flight")
    _from_zero(axes, right)
    return _over_time(figure, axes, run, right)


def batches(run: Run) -> Figure:
    """Mean size of the batches between two moments."""
    figure, axes = _figure("mean requests per batch")
    right = _right(axes)
    pairs = [(a, b) for a, b in zip(run.moments, run.moments[1:], strict=False) if b.batches > a.batches]
    times = [b.at_s for _, b in pairs]
    requests = [(b.batched_requests - a.batched_requests) / (b.batches - a.batches) for a, b in pairs]
    tokens = [(b.batched_tokens - a.batched_tokens) / (b.batches - a.batches) for a, b in pairs]
    axes.plot(times, requests, "-", color="tab:blue", label="requests (left)")
    right.plot(times, tokens, "-", color="tab:orange", alpha=0.7, label="tokens (right)")
    right.set_ylabel("mean tokens per batch")
    _from_zero(axes, right)
    return _over_time(figure, axes, run, right)


def plans(run: Run) -> Figure:
    """Share of the plans by length."""
    figure, axes = _figure("share of answers")
    groups = by_bucket(sample for sample in run.samples if sample.outcome is Outcome.ANSWERED)
    bottom = [0.0] * len(groups)
    for plan, colour in PLAN_COLOURS.items():
        shares = [sum(sample.plan == plan for sample in group) / len(group) for group in groups.values()]
        bars = axes.bar(range(len(groups)), shares, 0.6, bottom, color=colour, label=plan)
        labels = [f"{share:.0%}" if share >= 0.05 else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", color="w")
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_ylim(0, 1.12)
    return _by_length(figure, axes, groups)


def cost(run: Run, slo_s: Seconds) -> Figure:
    """Cost reported by the answers, by length."""
    figure, axes = _figure("USD per 1,000 answers")
    groups = by_bucket(sample for sample in run.samples if sample.outcome is Outcome.ANSWERED)
    usd = [Totals.of(group, slo_s).usd_per_1000 for group in groups.values()]
    bars = axes.bar(range(len(groups)), usd, 0.6, color=[LENGTH_COLOURS[name] for name in groups])
    axes.bar_label(bars, [f"{amount:.2g}" for amount in usd], padding=2)
    if any(usd):
        axes.set_yscale("log")
        axes.margins(y=0.15)
    return _by_length(figure, axes, groups, legend=False)


def cores(run: Run) -> Figure:
    """Shows whether the client was the bottleneck: cores, and how late it sent."""
    figure, axes = _figure("cores in use")
    _moments(axes, run.moments, lambda moment: moment.service_cores, "service", "tab:blue")
    _moments(axes, run.moments, lambda moment: moment.client_cores, "client", "tab:orange")
    right = _right(axes)
    parts = windows(run.samples, run.duration_s, run.duration_s / PARTS)
    late = [1e3 * percentile([sample.sent_s - sample.at_s for sample in part], 99) for _, part in parts]
    right.plot([at_s for at_s, _ in parts], late, ":", color="0.4", label="sent late, p99 (right)")
    right.set_ylabel("ms after it was due")
    _from_zero(axes, right)
    return _over_time(figure, axes, run, right)


def memory(run: Run) -> Figure:
    figure, axes = _figure("MiB resident, all replicas")
    _moments(axes, run.moments, lambda moment: moment.service_bytes / 2**20, "memory (left)", "tab:blue")
    _from_zero(axes)
    right = _right(axes)
    _moments(right, run.moments, lambda moment: float(moment.replicas), "replica processes (right)", "0.6")
    right.set_ylim(0, 1 + max((moment.replicas for moment in run.moments), default=1))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _over_time(figure, axes, run, right)


def sweep_latencies(steps: Sequence[Step], slo_s: Seconds) -> Figure:
    figure, axes = _figure("latency, s")
    ordered = sorted((step.run for step in steps), key=lambda run: run.offered_per_s)
    _latencies(axes, [(run.offered_per_s, run.samples) for run in ordered], slo_s)
    return _over_load(figure, axes, steps)


def sweep_goodput(steps: Sequence[Step], slo_s: Seconds) -> Figure:
    figure, axes = _figure("requests/s")
    ordered = sorted((step.run for step in steps), key=lambda run: run.offered_per_s)
    loads = [run.offered_per_s for run in ordered]
    totals = [Totals.of(run.samples, slo_s) for run in ordered]
    axes.plot([0, loads[-1]], [0, loads[-1]], ":", color="0.6", label="offered")
    for label, colour, name in (("answered", LATE, "answered"), ("in time", GOOD, "good")):
        per_s = [getattr(total, name) / run.duration_s for total, run in zip(totals, ordered, strict=True)]
        axes.plot(loads, per_s, "o-", color=colour, label=label)
    return _over_load(figure, axes, steps)


def _latencies(axes: Axes, parts: Iterable[tuple[float, list[Sample]]], slo_s: Seconds) -> None:
    """Median, p99 and SLO by length."""
    seen: dict[str, tuple[Points, Points]] = {}
    for x, samples in parts:
        for name, group in by_bucket(samples).items():
            taken = latencies(group)
            medians, tails = seen.setdefault(name, ([], []))
            few = len(taken) < MIN_ANSWERS
            medians.append((x, math.nan if few else percentile(taken, 50)))
            tails.append((x, math.nan if few else percentile(taken, 99)))
    _seconds(axes)
    for name, (medians, tails) in seen.items():
        if all(math.isnan(y) for _, y in tails):
            continue
        colour = LENGTH_COLOURS[name]
        axes.plot(*zip(*medians, strict=True), "o--", ms=3, color=colour, alpha=0.7)
        axes.plot(*zip(*tails, strict=True), "o-", ms=3, color=colour, label=f"{bucket_label(name)} tokens")
        axes.axhline(slo_s[name], color=colour, ls=":", lw=1)
    if axes.lines:
        axes.plot([], [], "-", color="0.3", label="p99")
        axes.plot([], [], "--", color="0.3", label="median")
        axes.plot([], [], ":", color="0.3", label="SLO")
        _legend(axes)


def _moments(axes: Axes, moments: Sequence[Moment], value: Callable[[Moment], float], label: str, colour: str) -> None:
    axes.plot(
        [moment.at_s for moment in moments], [value(moment) for moment in moments], "-", color=colour, label=label
    )


def _figure(unit: str) -> tuple[Figure, Axes]:
    figure = Figure((7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _right(axes: Axes) -> Axes:
    """A second scale on the right."""
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    return right


def _from_zero(*scales: Axes) -> None:
    for axes in scales:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))


def _seconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def _over_time(figure: Figure, axes: Axes, run: Run, right: Axes | None = None) -> Figure:
    """Time axis of the run, with events as lines; the time after the last request is grey."""
    last_s = max(
        [run.duration_s, *(sample.ended_s for sample in run.samples), *(moment.at_s for moment in run.moments)]
    )
    axes.set_xlim(0, last_s)
    axes.axvspan(run.duration_s, last_s, color="0.94", lw=0, zorder=0)
    for at_s, done_s, what in run.happened:
        axes.axvline(at_s, color=FAILED, lw=1)
        axes.axvspan(at_s, done_s, color=FAILED, alpha=0.08, lw=0)
        axes.annotate(f" {what}", (at_s, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=FAILED)
    axes.set_xlabel("seconds since the run began")
    _legend(axes, right)
    return figure


def _by_length(figure: Figure, axes: Axes, groups: dict[str, list[Sample]], *, legend: bool = True) -> Figure:
    labels = [f"{bucket_label(name)}\n{len(group):,} answers" for name, group in groups.items()]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_xlabel("tokens of a request")
    axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)
    if legend:
        _legend(axes)
    return figure


def _over_load(figure: Figure, axes: Axes, steps: Sequence[Step]) -> Figure:
    if (found := knee(steps)) is not None:
        axes.axvline(found.run.offered_per_s, color="0.3", lw=1)
        label = f" knee: {found.run.offered_per_s:.1f}/s"
        axes.annotate(label, (found.run.offered_per_s, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("offered requests/s")
    _legend(axes)
    return figure


def _legend(axes: Axes, right: Axes | None = None) -> None:
    """Above the chart, so that it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if right is not None:
        more, names = right.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    if handles:
        columns = min(len(handles), 4)
        axes.legend(handles, labels, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)
