"""`python -m loadtests`: an open load, judged by thresholds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from service.commands.terminal import (
    console,
    fail,
)


def loadtest(
    scenario: Annotated[str, typer.Option(help="smoke, mixed, long-beside-short, burst, overload, ...")] = "smoke",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Raise its load until a threshold is missed: where is the knee?")
    ] = False,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds; of each step of a sweep.")] = None,
    scale: Annotated[float, typer.Option(min=1e-3, help="Times the scenario's rates.")] = 1.0,
    seed: int = 0,
    trace: Annotated[Path | None, typer.Option(help="CSV as of `simulate` instead of the scenario's requests.")] = None,
    url: Annotated[str | None, typer.Option(help="A running service; default: one is started, and ended.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Of the running service; 9000 where --url has 8000.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="The same; 9464.")] = None,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="300 ports from here are used.")] = 22900,
    thresholds: Annotated[Path | None, typer.Option(help="Default: loadtests/thresholds.json.")] = None,
    directory: Annotated[Path, typer.Option(help="Where page, samples and figures are written.")] = Path("loadtest"),
) -> None:
    """An open load of HTTP and gRPC requests, judged by thresholds: exits with 1 where one is missed."""
    try:
        from loadtests import command
        from loadtests.run import ClientFailed, Options
        from loadtests.scenarios import SCENARIOS
        from loadtests.thresholds import DEFAULT
    except ModuleNotFoundError as error:
        fail(f"{error}: load tests are run in the repository, with the extra `loadtest`")
    from benchmarks.servers.process import Unavailable

    if scenario not in SCENARIOS:
        fail(f"scenario {scenario!r} is not one of {', '.join(SCENARIOS)}")
    target = command.Target(url, grpc_port, metrics_port, first_port)
    options = Options(scenario, duration, scale, seed, trace)
    test = command.saturation if sweep else command.one
    try:
        with console.status("") as status:

            def step(what: str) -> None:
                status.update(f"{scenario}: {what}")
                if not console.is_terminal:
                    console.print(f"{scenario}: {what}")

            result = test(options, target, thresholds or DEFAULT, directory, step)
    except (ValueError, OSError, Unavailable, ClientFailed) as error:
        fail(str(error))
    console.print(result.told, markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, result.files))}", soft_wrap=True)
    print(result.line)
    sys.exit(not result.passed)


if __name__ == "__main__":
    typer.run(loadtest)
