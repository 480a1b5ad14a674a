"""The command line: `farsight serve | models | calibrate | simulate | estimate | usage | report | key`."""

from __future__ import annotations

import typer

from service.commands import cost, models
from service.commands.calibrate import calibrate
from service.commands.serve import serve
from service.commands.simulate import simulate

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command()(serve)
app.command()(calibrate)
app.command()(simulate)
app.add_typer(cost.app)
app.add_typer(models.app, name="models")


@app.callback()
def root() -> None:
    """Farsight: long-context attention as a service."""


def main() -> None:
    app()
