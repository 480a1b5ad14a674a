"""What reading and proving packaged models needs, beyond what the service does."""

from __future__ import annotations

import importlib.util


def require(what: str, *modules: str) -> None:
    """Raises ModuleNotFoundError that names the first of `modules` that is missing, what needs it, and the extra."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{what} need {module}: pip install 'farsight[models]'")
