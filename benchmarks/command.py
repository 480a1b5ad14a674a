"""The `python -m benchmarks` commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import (
    attention_table,
    hardware,
    learning_table,
    peaks_table,
    real_attention_table,
    shapes_table,
    sparse_model_table,
    write,
)
from service.commands.terminal import console, settings

if TYPE_CHECKING:
    from benchmarks.attention import Length
    from benchmarks.contenders import Settings

app = typer.Typer(
    no_args_is_help=True, help="Measure a running service, or attention itself, compared with a baseline."
)

Host = Annotated[str, typer.Option(help="Host of the service.")]
Port = Annotated[int, typer.Option(help="HTTP port of the service.")]
Rounds = Annotated[int, typer.Option(min=1, help="Number of rounds; medians are printed.")]
Output = Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")]
Decoder = Annotated[Path, typer.Option(help="Directory of a decoder, as `farsight models get smollm2` makes one.")]
Tokens = Annotated[int, typer.Option(min=1024, help="Over the model's own length positions are scaled (YaRN).")]
LongText = Annotated[Path | None, typer.Option(help="A long text; default: CPython's interactive help.")]


@app.command()
def overhead(
    host: Host = "127.0.0.1", port: Port = 8000, rounds: Rounds = 5, requests: int = 2000, output: Output = None
) -> None:
    """A request that computes almost nothing, compared with a plain uvicorn app."""
    from benchmarks import overhead as bench

    figures = bench.run(host, port, rounds, requests)
    ours, plain = figures["farsight"], figures["plain uvicorn"]
    table = Table("", "p50 at 1", "requests/s at 16", title=f"overhead, medians of {rounds} rounds, {hardware()}")
    for name, row in figures.items():
        table.add_row(name, f"{1e3 * row.p50_s:.2f} ms", f"{row.requests_per_s:,.0f}")
    ratios = f"{ours.p50_s / plain.p50_s:.2f}x", f"{ours.requests_per_s / plain.requests_per_s:.2f}x"
    table.add_row("ratio", *ratios)
    console.print(table)
    write(output, {name: asdict(row) for name, row in figures.items()})


@app.command()
def throughput(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    rounds: Rounds = 5,
    model: str = "all-MiniLM-L6-v2",
    path: Annotated[Path | None, typer.Option(help="Directory of the model; default: the demo package.")] = None,
    count: int = 64,
    clients: int = 32,
    output: Output = None,
) -> None:
    """Mixed texts: sequential, concurrent, and sentence-transformers in one call."""
    from benchmarks import throughput as bench
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    directory = path or directory_of(DEMO_MODEL)
    figures = bench.run(host, port, model, directory, rounds, count, clients)
    table = Table("", "seconds", "vs concurrent", title=f"{count} texts, {figures.tokens} tokens, {hardware()}")
    for name, seconds in (
        (f"{clients} concurrent clients", figures.concurrent_s),
        ("sequential", figures.one_by_one_s),
        ("sentence-transformers, one call", figures.sentence_transformers_s),
    ):
        table.add_row(name, f"{seconds:.3f}", f"{seconds / figures.concurrent_s:.2f}x")
    console.print(table)
    console.print(f"lowest cosine to sentence-transformers: {figures.lowest_cosine:.6f}")
    write(output, asdict(figures))


@app.command()
def serving(
    rounds: Rounds = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests of one text per round and server.")] = 512,
    clients: Annotated[int, typer.Option(min=1, help="Each sends its next request when the last is answered.")] = 32,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 21300,
    output: Output = None,
) -> None:
    """Embeddings compared with infinity, LitServe and FastAPI, all started here and installed in venvs on first use."""
    from benchmarks import serving as bench
    from service.config import Config
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    directory = directory_of(DEMO_MODEL)
    settings = bench.Settings(rounds=rounds, requests=requests, clients=clients, first_port=first_port)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=bench.steps(settings))
        cache = Config().cache_dir.expanduser() / "bench"
        rows = bench.run(settings, directory, cache, lambda what: progress.update(bar, description=what, advance=1))
    setting = f"{DEMO_MODEL.name}, float32, {requests} requests of 1 text, {clients} clients"
    columns = "", "requests/s", "p50", "p95", "p99", "lowest cosine"
    table = Table(*columns, title=f"{setting}, medians of {rounds} rounds, {hardware()}")
    for cells in bench.table_rows(rows):
        table.add_row(*cells)
    table.caption = "\n".join(escape(note) for note in bench.notes(rows))
    table.caption_justify = "left"
    console.print(table)
    write(output, bench.figures(settings, rows))


@app.command()
def host_work(
    rate: Annotated[float, typer.Option(min=1, help="Short requests a second, of each kind.")] = 10.0,
    duration: Annotated[float, typer.Option(min=5, help="Seconds, without and with the loud tenant.")] = 40.0,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 21700,
    output: Output = None,
) -> None:
    """One tenant's short requests while another one sends inputs that take long to read."""
    from benchmarks import host_work as bench
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    settings = bench.Settings(rate, duration, first_port)
    found = bench.run(settings, directory_of(DEMO_MODEL), console.print)
    title = f"{rate:g} short requests/s of each kind, next to three of long reading in flight, {hardware()}"
    table = Table("", "p50 alone", "p99 alone", "p50 with", "p99 with", "limit of p99", title=title)
    for kind, row in found.kinds.items():
        seconds = row.alone_p50_s, row.alone_p99_s, row.beside_p50_s, row.beside_p99_s, row.bound_s
        table.add_row(kind, *(f"{1e3 * value:.0f} ms" for value in seconds))
    console.print(table)
    console.print(found.loud, found.usage)
    write(output, {"settings": asdict(settings), **asdict(found)})


@app.command()
def scheduling(
    tokens: Annotated[
        int, typer.Option(min=1024, help="Length of the long attention requests, 8 heads of 64.")
    ] = 32768,
    mode: Annotated[str, typer.Option(help="Mode of the long requests: auto, dense, chunked or sparse.")] = "auto",
    dtype: str = "float32",
    load: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the capacity for short requests.")] = 0.3,
    duration: Annotated[
        float, typer.Option(min=5, help="Seconds of short requests, without and with long ones.")
    ] = 40.0,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 21700,
    output: Output = None,
) -> None:
    """Short embeddings while a long request is always in flight: fair scheduling compared with first in, first out."""
    from benchmarks import scheduling as bench
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    directory = directory_of(DEMO_MODEL)
    settings = bench.Settings(tokens, mode, dtype, load, duration, first_port)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=4 * len(bench.ORDERS))
        found = bench.run(settings, directory, lambda what: progress.update(bar, description=what, advance=1))
    title = f"short embeddings at {load:.0%} load, {tokens:,}-token {mode} attention in flight, {hardware()}"
    table = Table("", *found, title=title)
    rows: list[tuple[str, Callable[[bench.Figures], str]]] = [
        ("short requests/s", lambda figures: f"{figures.rate_per_s:.1f} of {figures.capacity_per_s:.0f}"),
        ("short p50 alone", lambda figures: f"{1e3 * figures.short_alone_p50_s:.0f} ms"),
        ("short p99 alone", lambda figures: f"{1e3 * figures.short_alone_p99_s:.0f} ms"),
        ("short p50 with long", lambda figures: f"{1e3 * figures.short_beside_p50_s:.0f} ms"),
        ("short p99 with long", lambda figures: f"{1e3 * figures.short_beside_p99_s:.0f} ms"),
        ("2x p99 alone + 50 ms", lambda figures: f"{1e3 * figures.bound_s:.0f} ms"),
        ("long alone", lambda figures: f"{figures.long_alone_s:.2f} s"),
        ("long with short", lambda figures: f"{figures.long_beside_s:.2f} s ({figures.long_requests})"),
        ("ratio", lambda figures: f"{figures.long_beside_s / figures.long_alone_s:.2f}x"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(figures) for figures in found.values()))
    console.print(table)
    write(output, {"settings": asdict(settings), **{name: asdict(figures) for name, figures in found.items()}})


@app.command()
def overload(
    duration: Annotated[float, typer.Option(min=10, help="Seconds at capacity, and again at the overload.")] = 60.0,
    factor: Annotated[float, typer.Option(min=1.1, help="Overload, as a multiple of the capacity.")] = 2.0,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 22100,
    output: Output = None,
) -> None:
    """Attention at capacity and at twice the capacity, open loop: goodput, refusals, accuracy of Retry-After."""
    from benchmarks import overload as bench
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    directory = directory_of(DEMO_MODEL)
    settings = bench.Settings(duration, factor, first_port)
    found = bench.run(settings, directory)
    table = Table("", "", title=f"attention of 512 to 1,536 tokens, {factor:g}x overload, {hardware()}")
    goodput = found.at_overload_per_s / found.at_capacity_per_s
    table.add_row("capacity, closed loop", f"{found.capacity_per_s:.1f} requests/s")
    table.add_row("answered at capacity", f"{found.at_capacity_per_s:.1f} requests/s")
    table.add_row("answered at overload", f"{found.at_overload_per_s:.1f} requests/s ({goodput:.0%})")
    table.add_row("answers at overload", ", ".join(f"{count} x {code}" for code, count in found.statuses.items()))
    table.add_row("Retry-After within a factor of 2", f"{found.right:.0%} of {len(found.retry_reported_s)}")
    memory = (f"{size / 2**20:.0f}" for size in (found.memory_before, found.memory_peak, found.memory_after))
    table.add_row("memory of the replica: before, peak, after", f"{', '.join(memory)} MiB")
    console.print(table)
    write(output, {"settings": asdict(settings), **asdict(found)})


@app.command()
def autoscaling(
    both: Annotated[float, typer.Option(min=1, help="Seconds of load for two replicas, after both answer.")] = 20.0,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 22500,
    output: Output = None,
) -> None:
    """A second replica is added under load and removed after it; every answer is counted."""
    from benchmarks import autoscaling as bench
    from service.models.demo import DEMO_MODEL
    from service.models.files import directory_of

    directory = directory_of(DEMO_MODEL)
    settings = bench.Settings(both_s=both, first_port=first_port)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=4)
        found = bench.run(settings, directory, lambda what: progress.update(bar, description=what, advance=1))
    table = Table("", "", title=f"from one replica to two and back, {hardware()}")
    table.add_row("the second replica answers after", f"{found.came_s:.1f} s of load")
    table.add_row("answered before", f"{found.alone_per_s:.1f} requests/s")
    table.add_row("answered by both", f"{found.both_per_s:.1f} requests/s")
    table.add_row("work of the second", f"{found.worked_s:.1f} processor seconds")
    table.add_row("the second is removed", f"{found.went_s:.1f} s after the load")
    table.add_row("answers", ", ".join(f"{count} x {code}" for code, count in found.statuses.items()))
    console.print(table)
    write(output, {"settings": asdict(settings), **asdict(found)})


@app.command()
def forward(
    tokens: Annotated[int, typer.Option(min=512)] = 32768,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    rounds: Rounds = 3,
    max_error: Annotated[float, typer.Option(min=0, max=1, help="Of each layer; above it the layer is exact.")] = 0.02,
    output: Output = None,
) -> None:
    """A long pass through a seeded Llama-like model: sparse compared with Transformers with SDPA."""
    from benchmarks import forward as bench

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=2 * (rounds + 1))
        step = lambda what: progress.update(bar, description=what, advance=1)  # noqa: E731 (one line of glue)
        found = bench.run(tokens, layers, rounds, max_error, step)
    table = Table("", "seconds", "growth, MiB", title=f"{tokens:,} tokens, {layers} layers, float32, {hardware()}")
    table.add_row("sparse", f"{found.sparse_s:.2f}", f"{found.grew_bytes['sparse'] / 2**20:,.0f}")
    table.add_row("Transformers, SDPA", f"{found.sdpa_s:.2f}", f"{found.grew_bytes['sdpa'] / 2**20:,.0f}")
    console.print(table)
    for number, layer in enumerate(found.layers):
        density = "" if layer.density is None else f", density {layer.density:.3f}"
        console.print(f"layer {number}: {layer.plan}{density}, error at most {layer.relative_l2_upper:.4f}")
    console.print(f"{found.speedup:.2f}x; the output differs by {found.output_error:.4f}")
    write(output, asdict(found))


@app.command(name="real-attention")
def real_attention(
    model: Decoder,
    tokens: Tokens = 8192,
    layers: Annotated[str, typer.Option(help="Layers, comma-separated.")] = "0,1,2,4,8,12,16,20,24,28,29",
    max_error: Annotated[float, typer.Option(min=0, max=1)] = 0.05,
    rounds: Rounds = 3,
    text: LongText = None,
    output: Output = None,
) -> None:
    """Attention of a real decoder that reads a real text: sparse as the service does it, compared with SDPA."""
    from benchmarks import real_attention as bench

    settings = bench.Settings(model, tokens, _numbers(layers, "layers", 0), max_error, rounds, text)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=bench.steps(settings))
        try:
            found = list(bench.run(settings, lambda what: progress.update(bar, description=what, advance=1)))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    console.print(
        real_attention_table(found, f"{model.name}, {tokens:,} tokens, max_error {max_error:g}, {hardware()}")
    )
    for layer in found:
        if layer.reason:
            console.print(f"layer {layer.layer}: {layer.reason}", markup=False)
    given = {**asdict(settings), "directory": model.name, "text": text and text.name}
    write(output, {"settings": given, "layers": [asdict(layer) for layer in found]})


@app.command(name="sparse-model")
def sparse_model(
    model: Decoder,
    tokens: Tokens = 8192,
    documents: Annotated[int, typer.Option(min=1, help="With ten facts each.")] = 10,
    max_error: Annotated[float, typer.Option(min=0, max=1, help="Of the last hidden state.")] = 0.05,
    text: LongText = None,
    output: Output = None,
) -> None:
    """Sparse passes of a real decoder over real texts: seconds, output, loss and facts, compared with SDPA."""
    from benchmarks import sparse_model as bench

    given = bench.Settings(model, tokens, documents, max_error, text)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=2 * documents)
        try:
            found = list(bench.run(given, lambda what: progress.update(bar, description=what, advance=1)))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    summary = bench.summary(found)
    console.print(
        sparse_model_table(found, summary, f"{model.name}, {tokens:,} tokens, max_error {max_error:g}, {hardware()}")
    )
    shown = {**asdict(given), "directory": model.name, "text": text and text.name}
    write(output, {"settings": shown, "summary": asdict(summary), "documents": [asdict(one) for one in found]})


@app.command()
def attention(
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "4096,8192,16384,32768",
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    causal: Annotated[bool, typer.Option("--causal/--bidirectional")] = True,
    max_error: Annotated[float, typer.Option(min=0, max=1, help="Above it sparse falls back to dense.")] = 0.02,
    epsilon: Annotated[
        float | None, typer.Option(help="Risk that sparse may leave; default: as in the service.")
    ] = None,
    rounds: Rounds = 3,
    inputs: Annotated[
        Literal["structured", "diffuse"], typer.Option("--input", help="With or without planted structure.")
    ] = ("structured"),
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    dense_limit: Annotated[int, typer.Option(help="Tokens above which dense, chunked and flex are skipped.")] = 32768,
    antidiagonal: Annotated[bool, typer.Option(help="XAttention's selection at the density of sparse.")] = True,
    antidiagonal_limit: Annotated[int, typer.Option(help="Tokens above which it is skipped.")] = 32768,
    flex: Annotated[bool, typer.Option(help="Include torch FlexAttention, dense.")] = False,
    output: Output = None,
    plots: Annotated[Path | None, typer.Option(help="Write four charts into this directory.")] = None,
) -> None:
    """Dense, chunked and sparse attention compared with torch's SDPA: seconds, errors, density, memory."""
    from benchmarks.contenders import Settings
    from service.attention import DEFAULT_EPSILON

    _check(heads, kv_heads, device, plots)
    settings = Settings(
        lengths=_numbers(lengths, "lengths", 2), heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        is_causal=causal, max_error=max_error, epsilon=DEFAULT_EPSILON if epsilon is None else epsilon,
        rounds=rounds, input=inputs, seed=seed, device=device, dense_limit=dense_limit,
        antidiagonal_limit=antidiagonal_limit if antidiagonal else 0, flex=flex,
    )  # fmt: skip
    _attention(settings, output, plots)


def _attention(settings: Settings, output: Path | None, plots: Path | None) -> None:
    from benchmarks import attention as bench

    measured: list[Length] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=bench.steps(settings))
        for length in bench.run(settings, lambda what: progress.update(bar, description=what, advance=1)):
            measured.append(length)
            progress.update(bar, completed=bench.steps(settings) * len(measured) / len(settings.lengths))
            _print_length(length, f"{length.length:,} tokens, {_setting(settings)}")
            # after every length: the longest ones take hours and may be interrupted
            write(output, bench.figures(settings, measured))
    for found in bench.growth(measured)[-2:]:
        console.print(f"sparse seconds from {found.start:,} to {found.stop:,} tokens: n^{found.exponent:.2f}")
    if plots is not None:
        from benchmarks.plots import draw

        for path in draw(measured, settings.max_error, plots, _setting(settings)):
            console.print(str(path))


def _setting(settings: Settings) -> str:
    """One line for the titles of tables and charts."""
    shape = f"{settings.heads}/{settings.kv_heads} heads of {settings.head_dim}, {settings.dtype}"
    return f"{settings.input}, {'causal' if settings.is_causal else 'bidirectional'}, {shape}, {settings.device}"


def _print_length(length: Length, title: str) -> None:
    console.print(attention_table(length, title))
    for row in length.rows:
        if row.absent or row.reason:
            style = "red" if row.fallback else None
            console.print(f"{row.name}: {row.absent or row.reason}", style=style, markup=False)


@app.command()
def predictions(
    count: Annotated[int, typer.Option(min=0, help="Number of held-out shapes; 0: none.")] = 60,
    rounds: Rounds = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    arrivals: Annotated[
        int,
        typer.Option(min=0, help="Warm-up arrivals per round in a running engine, before twice as many are compared."),
    ] = 200,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Also compare peak memory, each request in its own process.")
    ] = True,
    output: Output = None,
) -> None:
    """Predicted compared with actual seconds and peak memory: of every plan, of the chosen plan, and of mixed requests
    in a running engine that learns; and how long an estimate takes."""
    import torch

    from benchmarks import learning, peaks
    from benchmarks import predictions as bench
    from service.device import pick_device
    from service.planning.profile_cache import load_or_measure

    config = settings()
    torch.set_num_threads(config.cpu_threads or os.cpu_count() or 1)
    chosen = pick_device(device)
    # first: processes are forked before torch starts threads
    fitted = peaks.run() if memory else None
    found: dict[str, Any] = {}
    if count:
        profile = load_or_measure(chosen, config.cache_dir)
        with Progress(console=console) as progress:
            task = progress.add_task("shapes", total=count)
            step = lambda done: progress.update(task, completed=done)  # noqa: E731 (one line of glue)
            figures = bench.run(profile, config, chosen, count, rounds, step)
        console.print(shapes_table(figures))
        found |= asdict(figures)
    if fitted is not None:
        console.print(peaks_table(fitted))
        found["peaks"] = asdict(fitted)
    if arrivals:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("mixed requests", total=rounds)
            learned = []
            for number in range(rounds):
                learned.append(learning.run(arrivals, 2 * arrivals, seed=number))
                progress.update(task, completed=number + 1)
        console.print(learning_table(learned))
        found["learning"] = [asdict(found_round) for found_round in learned]
    write(output, found)


def _numbers(text: str, name: str, least: int) -> tuple[int, ...]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least:
        raise typer.BadParameter(f"{name}: expected comma-separated numbers of at least {least}, got {text!r}")
    return tuple(numbers)


def _check(heads: int, kv_heads: int, device: str, plots: Path | None) -> None:
    """Refuse options that would otherwise fail late."""
    import torch

    if heads % kv_heads:
        raise typer.BadParameter(f"heads: expected a multiple of kv-heads {kv_heads}, got {heads}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device: expected a CUDA device, torch finds none")
    if plots is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("plots: matplotlib is not installed; pip install matplotlib")
