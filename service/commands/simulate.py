"""`farsight simulate`: runs a trace through clusters of several sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from service.commands.serve import with_models
from service.commands.terminal import console, device, fail, settings, with_options
from service.models.demo import DEMO_MODEL


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """The command line."""

    trace: Annotated[Path | None, typer.Option(help="CSV: at_s, tokens, model, priority, tenant.")] = None
    kind: Annotated[str, typer.Option(help="Arrivals if no trace is given: poisson, bursts, heavy or diurnal.")] = (
        "poisson"
    )
    rate: Annotated[float, typer.Option(min=1e-3, help="Mean requests/s.")] = 20.0
    requests: Annotated[int, typer.Option(min=1)] = 10_000
    replicas: Annotated[str, typer.Option(help="Numbers of replicas, comma-separated.")] = "1,2,4,8"
    seed: int = 0
    write: Annotated[Path | None, typer.Option(help="Write the generated trace as CSV.")] = None
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None


@with_options(SimulateOptions)
def simulate(options: SimulateOptions) -> None:
    """Simulate a trace with the real scheduler and a fake clock: latency, refusals, fairness and cost by cluster size.

    Uses the speed measured on this device. Models are FARSIGHT_MODELS and the demo model.
    """
    from service.simulate import command, traces

    try:
        counts = _replica_counts(options.replicas)
        entries = command.entries(
            options.trace, options.kind, options.rate, options.requests, DEMO_MODEL.name, options.seed
        )
        if options.write is not None:
            traces.write(options.write, entries)
        config = with_models(settings(), demo=True)
        device(config)
        rows = [command.run(entries, count, config) for count in counts]
    except (ValueError, OSError) as error:
        fail(str(error))
    console.print(command.table(rows, len(entries)))
    if options.output is not None:
        command.write_json(options.output, rows)


def _replica_counts(text: str) -> list[int]:
    if not re.fullmatch(r"[\d\s]+(,[\d\s]+)*", text):
        raise ValueError(f"--replicas: expected numbers such as 1,2,4, got {text!r}")
    return [int(number) for number in text.split(",")]
