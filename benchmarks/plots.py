"""Four charts of `benchmarks attention` over the length: speed-up, error, density, memory. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.attention import Length, Row

COLOURS = {
    "sdpa": "0.4",
    "dense": "tab:blue",
    "chunked": "tab:green",
    "sparse": "tab:red",
    "antidiagonal": "tab:orange",
    "flex": "tab:purple",
}


Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """One file: the value that it shows of each row, and a level to compare with."""

    name: str
    label: str
    value: Callable[[Row], float | None]
    base: int | None  # of the logarithmic axis; None: linear axis
    level: float | None = None  # horizontal line
    reported: Callable[[Row], float | None] | None = None  # the value that the answer reports, dashed


def draw(lengths: Sequence[Length], max_error: float, directory: Path, title: str) -> list[Path]:
    """Write speedup.png, error.png, density.png and memory.png; returns their paths."""
    charts = (
        Chart("speedup", "times as fast as SDPA", lambda row: row.speedup, 2, 1.0),
        Chart("error", "relative L2 error", lambda row: row.error or None, 10, max_error, _reported),
        Chart("density", "share of visible pairs scored", lambda row: row.density, None),
        Chart("memory", "peak MiB above the inputs", lambda row: (row.peak_bytes or 0) / 2**20 or None, 2),
    )
    directory.mkdir(parents=True, exist_ok=True)
    return [_chart(chart, lengths, directory / f"{chart.name}.png", title) for chart in charts]


def series(chart: Chart, lengths: Sequence[Length]) -> list[tuple[str, str, str, Points]]:
    """(label, colour, format, points) per contender; fallbacks of sparse are separate points, not part of its line."""
    found = []
    for name, colour in COLOURS.items():
        rows = [(length.length, row) for length in lengths if (row := length.row(name)) is not None]
        found.append((name, colour, "o-", _points(rows, chart.value, fallback=False)))
        found.append((f"{name}, fell back", colour, "x", _points(rows, chart.value, fallback=True)))
        if chart.reported is not None:
            found.append((f"{name}, reported limit", colour, "--", _points(rows, chart.reported, fallback=False)))
    return [line for line in found if not all(isnan(y) for _, y in line[3])]


def _chart(chart: Chart, lengths: Sequence[Length], path: Path, title: str) -> Path:
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    for label, colour, form, points in series(chart, lengths):
        axes.plot([n for n, _ in points], [y for _, y in points], form, color=colour, label=label)
    if chart.level is not None:
        axes.axhline(chart.level, color="0.7", ls=":", lw=1)
    if chart.base is None:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log", base=chart.base)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xscale("log", base=2)
    axes.set_xticks([length.length for length in lengths], [f"{length.length:,}" for length in lengths])
    axes.set(xlabel="tokens", ylabel=chart.label, title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, format="png")
    return path


def _points(rows: Sequence[tuple[int, Row]], value: Callable[[Row], float | None], *, fallback: bool) -> Points:
    """Points of the rows; NaN for missing values, so that lines have a gap there."""
    known = [(n, value(row) if row.fallback is fallback else None) for n, row in rows]
    return [(n, nan if y is None else y) for n, y in known]


def _reported(row: Row) -> float | None:
    return row.reported_relative_l2_upper
