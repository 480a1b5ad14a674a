"""What the benchmarks print and write: tables, and figures as JSON with hardware, versions and command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import orjson
from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks import learning, peaks, real_attention, sparse_model
    from benchmarks.attention import Length, Row
    from benchmarks.predictions import Figures


def hardware() -> str:
    return f"{os.cpu_count()} cores {platform.machine()}"


def document(figures: dict[str, Any], package: str = "benchmarks") -> dict[str, Any]:
    """Figures with the hardware, versions and command that produced them."""
    versions = {name: version(name) for name in ("farsight", "ray", "torch", "transformers")}
    return {
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": versions,
        "command": shlex.join(["python", "-m", package, *sys.argv[1:]]),
        "figures": figures,
    }


def write(output: Path | None, figures: dict[str, Any]) -> None:
    if output is not None:
        output.write_bytes(orjson.dumps(document(figures), option=orjson.OPT_INDENT_2) + b"\n")


def attention_table(length: Length, title: str) -> Table:
    columns = "", "seconds", "min", "max", "vs SDPA", "error", "reported <=", "density", "needles", "MiB"
    table = Table(*columns, title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    for row in length.rows:
        if row.absent:
            table.add_row(row.name, "absent")
        else:
            name = f"[red]{row.name}: {row.kind}[/red]" if row.fallback else row.name
            table.add_row(name, *_cells(row))
    return table


def real_attention_table(layers: Sequence[real_attention.Layer], title: str) -> Table:
    columns = "layer", "answered by", "density", "reported <=", "error", "vs SDPA", "antidiagonal's error"
    table = Table(*columns, title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    for row in layers:
        density = "" if row.density is None else f"{row.density:.2f}"
        answer = row.kind, density, f"{row.reported_upper:.3f}", f"{row.error:.3f}", f"{row.ratio:.2f}x"
        theirs = "" if row.antidiagonal_error is None else f"{row.antidiagonal_error:.3f}"
        table.add_row(str(row.layer), *answer, theirs)
    table.add_row("mean", "", "", "", "", f"{fmean(row.ratio for row in layers):.2f}x", "")
    return table


def sparse_model_table(reads: Sequence[sparse_model.Read], summary: sparse_model.Summary, title: str) -> Table:
    columns = "document", "reported <=", "error", "vs SDPA", "loss", "facts ranked the same", "found, exactly"
    table = Table(*columns, title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    for number, row in enumerate(reads, 1):
        same = sum(ours == exact for ours, exact in zip(row.ranks, row.exact_ranks, strict=True))
        facts = f"{same} of {len(row.ranks)}", f"{row.ranks.count(1)}, {row.exact_ranks.count(1)}"
        loss = f"{row.exact_loss:.3f} {row.loss - row.exact_loss:+.4f}"
        error = f"{row.reported_upper:.3f}", f"{row.error:.3f}"
        table.add_row(str(number), *error, f"{row.sdpa_s / row.seconds:.2f}x", loss, *facts)
    error = f"{summary.covered:.0%} within", f"{summary.error:.3f}"
    shares = f"{summary.same_ranks:.0%}", f"{summary.found:.0%}, {summary.exact_found:.0%}"
    table.add_row("all", *error, f"{summary.speedup:.2f}x", f"{summary.loss_difference:+.4f}", *shares)
    return table


def shapes_table(found: Figures) -> Table:
    table = Table("", "within 25 %", title=f"{found.shapes} held-out shapes, {hardware()}")
    for kind, share in found.within.items():
        table.add_row(kind, f"{100 * share:.0f} %")
    table.add_row("the plan chosen", f"{100 * found.chosen_within:.0f} %")
    table.add_row("mean regret", f"{100 * found.mean_regret:.1f} %")
    return table


def peaks_table(found: peaks.Figures) -> Table:
    title = f"predicted over actual peak memory, from {found.least_bytes >> 20} MiB on, {hardware()}"
    table = Table("", "ratio", "actual, MiB", title=title)
    for row in found.rows:
        table.add_row(row.name, f"{row.ratio:.2f}", f"{row.actual_bytes / 2**20:.0f}")
    table.add_row("between 0.9 and 1.2", f"{found.within:.0%}")
    return table


def learning_table(rounds: list[learning.Round]) -> Table:
    def cell(shares: list[float]) -> str:
        return f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"

    title = f"mixed requests in a running engine, medians of {len(rounds)} rounds, {hardware()}"
    table = Table("", "within 25 %", title=title)
    table.add_row("with learned corrections", cell([found.within for found in rounds]))
    table.add_row("by calibration alone", cell([found.within_bare for found in rounds]))
    for name in rounds[0].estimate_s:
        p50, p99 = (median(found.estimate_s[name][index] for found in rounds) for index in (0, 1))
        table.add_row(f"estimate, {name}", f"p50 {1e3 * p50:.2f} ms, p99 {1e3 * p99:.2f} ms")
    return table


def _cells(row: Row) -> list[str]:
    def cell(number: float | None, form: str) -> str:
        return "" if number is None else form.format(number)

    return [
        _seconds(row.median_s, 3),
        _seconds(row.min_s, 2),
        _seconds(row.max_s, 2),
        cell(row.speedup, "{:.2f}x"),
        cell(row.error, "{:.1e}"),
        "exact" if row.fallback else cell(row.reported_relative_l2_upper, "{:.1e}"),
        cell(row.density, "{:.3f}"),
        cell(row.needle_error, "{:.1e}"),
        cell(None if row.peak_bytes is None else row.peak_bytes / 2**20, "{:.0f}"),
    ]


def _seconds(seconds: float | None, digits: int) -> str:
    assert seconds is not None, "bug: an absent contender was timed"
    return f"{seconds:.{digits}g}" if seconds < 10**digits else f"{seconds:.0f}"
