"""Shared by the commands: the console, how a command fails, the settings and the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, NoReturn, TypeVar, get_type_hints

from pydantic import ValidationError
from rich.console import Console

from service.config import Config

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)

PIPE_WIDTH = 160  # characters of a line in a file or a pipe; rich would cut tables at 80

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)


def fail(message: str) -> NoReturn:
    """Print the message in red and exit with status 1."""
    console.print(f"farsight: {message}", style="red", soft_wrap=True, markup=False)
    sys.exit(1)


def with_options(cls: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorator: makes the fields of a dataclass the options of a typer command, which receives an instance of it."""
    types = get_type_hints(cls, include_extras=True)
    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in fields(cls)
    ]

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            function(cls(**values))

        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = types
        return command

    return decorate


def settings(**given: object) -> Config:
    """Settings from the environment, overridden by those given and not None. Ends the command if one is invalid."""
    known = {f"FARSIGHT_{field.upper()}" for field in Config.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("FARSIGHT_") and name not in known)
    if unknown:
        fail(f"configuration: {', '.join(unknown)} is not a setting; see service/config.py for the names")
    try:
        return Config.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = getattr(first.get("ctx", {}).get("error"), "__cause__", None)  # where JSON could not be parsed
        problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    fail(f"configuration: {problem}" + (f" ({cause})" if cause else ""))


def device(config: Config) -> torch.device:
    """The configured device. Ends the command if it is not available."""
    from service.device import pick_device

    try:
        return pick_device(config.device)
    except RuntimeError as error:
        fail(str(error))
