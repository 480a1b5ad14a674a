"""`farsight simulate`: a trace through clusters of several sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from service.commands.serve import with_models
from service.commands.terminal import (
    console,
    device,
    fail,
    settings,
)
from service.models.demo import DEMO_MODEL


def simulate(
    trace: Annotated[Path | None, typer.Option(help="CSV: at_s, tokens, model, priority, tenant.")] = None,
    kind: Annotated[str, typer.Option(help="Without a trace: poisson, bursts, heavy or diurnal.")] = "poisson",
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second, in the mean.")] = 20.0,
    requests: Annotated[int, typer.Option(min=1)] = 10_000,
    replicas: Annotated[str, typer.Option(help="Numbers of replicas, with commas.")] = "1,2,4,8",
    seed: int = 0,
    write: Annotated[Path | None, typer.Option(help="Keep the drawn trace as CSV.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """The real scheduler with a fake clock: latency, refusals, fairness and cost of a trace on so many replicas.

    Seconds are those that were measured on this device; models are FARSIGHT_MODELS and the demo's.
    """
    from service.simulate import command, traces

    try:
        if not re.fullmatch(r"[\d\s]+(,[\d\s]+)*", replicas):
            raise ValueError(f"--replicas {replicas!r} is not a list of numbers such as 1,2,4")
        counts = [int(one) for one in replicas.split(",")]
        entries = command.entries(trace, kind, rate, requests, DEMO_MODEL.name, seed)
        if write is not None:
            traces.write(write, entries)
        config = with_models(settings(), demo=True)
        device(config)
        rows = [command.run(entries, count, config) for count in counts]
    except (ValueError, OSError) as error:
        fail(str(error))
    console.print(command.table(rows, len(entries)))
    if output is not None:
        command.write_json(output, rows)
