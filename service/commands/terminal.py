"""What the commands share: where they write, how they fail, the settings and the device that they are given."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError
from rich.console import Console

from service.config import Config

if TYPE_CHECKING:
    import torch

WIDE = 160  # of tables in a file or a pipe, where rich would cut them at 80

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


def fail(message: str) -> NoReturn:
    console.print(f"farsight: {message}", style="red", soft_wrap=True, markup=False)
    sys.exit(1)


def settings(**given: object) -> Config:
    """Of the environment, and what is given and not None; ends the command where they are wrong."""
    known = {f"FARSIGHT_{field.upper()}" for field in Config.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("FARSIGHT_") and name not in known)
    if unknown:
        fail(f"configuration: {', '.join(unknown)} is not a setting; see service/config.py for their names")
    try:
        return Config.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = getattr(first.get("ctx", {}).get("error"), "__cause__", None)  # of JSON that cannot be read
        what = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    fail(f"configuration: {what}" + (f" ({where})" if where else ""))


def device(config: Config) -> torch.device:
    """Ends the command where it was asked for and is not there."""
    from service.device import pick_device

    try:
        return pick_device(config.device)
    except RuntimeError as error:
        fail(str(error))
