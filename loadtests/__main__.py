"""`python -m loadtests`: open-loop load, compared with thresholds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from service.commands.terminal import console, fail


def loadtest(
    scenario: Annotated[str, typer.Option(help="smoke, mixed, long-beside-short, burst, overload, ...")] = "smoke",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the knee: raise the load until a threshold is missed.")
    ] = False,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds; with --sweep of each step.")] = None,
    scale: Annotated[float, typer.Option(min=1e-3, help="Factor for the rates of the scenario.")] = 1.0,
    seed: int = 0,
    trace: Annotated[
        Path | None, typer.Option(help="CSV of `farsight simulate`, instead of the scenario's requests.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running service; default: a service is started and stopped.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port of the running service; default 9000 if --url has port 8000.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Metrics port of the running service; default 9464 if --url has port 8000.")
    ] = None,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 22900,
    thresholds: Annotated[Path | None, typer.Option(help="Default: loadtests/thresholds.json.")] = None,
    directory: Annotated[Path, typer.Option(help="Directory for page, samples and figures.")] = Path("loadtest"),
) -> None:
    """Send an open-loop load over HTTP and gRPC and check it against thresholds; exit with 1 if one is missed."""
    try:
        from loadtests import command
        from loadtests.run import ClientFailed, Options
        from loadtests.scenarios import SCENARIOS
        from loadtests.thresholds import DEFAULT
    except ModuleNotFoundError as error:
        fail(f"{error}: load tests run in the repository and need the extra `loadtest`")
    from benchmarks.servers.process import Unavailable

    if scenario not in SCENARIOS:
        fail(f"scenario: expected one of {', '.join(SCENARIOS)}, got {scenario!r}")
    target = command.Target(url, grpc_port, metrics_port, first_port)
    options = Options(scenario, duration, scale, seed, trace)
    test = command.run_sweep if sweep else command.run_scenario
    try:
        with console.status("") as status:

            def step(what: str) -> None:
                status.update(f"{scenario}: {what}")
                if not console.is_terminal:
                    console.print(f"{scenario}: {what}")

            result = test(options, target, thresholds or DEFAULT, directory, step)
    except (ValueError, OSError, Unavailable, ClientFailed) as error:
        fail(str(error))
    console.print(result.text, markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, result.files))}", soft_wrap=True)
    print(result.line)
    sys.exit(not result.passed)


if __name__ == "__main__":
    typer.run(loadtest)
