"""Loading, replacing and removing models while the service runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from service.config import Config, ModelConfig
from service.device import side_pool
from service.errors import FarsightError, Kind, invalid
from service.models.registry import Registry


class ModelManager:
    """Changes the registry on a thread of its own, one change at a time: requests are answered meanwhile."""

    def __init__(self, config: Config, registry: Registry) -> None:
        self._config, self._registry = config, registry
        self._loader = side_pool(1, "load")  # not the parsers': a model that loads must not take their time

    async def load(self, name: str) -> None:
        """Load or reload one model; the one of that name before it answers until it is proven.

        Raises FarsightError: models may not be changed here, the name is unknown, or the model cannot be loaded.
        """
        self._check_may_change()
        config = self._config_of(name)
        # shielded: a caller who leaves stops neither the load nor what waits for it
        work = asyncio.get_running_loop().run_in_executor(self._loader, self._registry.load, config)
        entry = await asyncio.shield(work)
        if entry.reason:
            raise invalid(f"model {name!r} cannot be loaded: {entry.reason}", code="load_failed", param="model")

    async def unload(self, name: str) -> None:
        """Refuse new requests for it; those that have begun finish. Raises FarsightError."""
        self._check_may_change()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._loader, self._registry.unload, name))

    async def set(self, configs: Sequence[ModelConfig]) -> None:
        """Serve exactly these."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._loader, self._registry.set, configs))

    def close(self) -> None:
        self._loader.shutdown()

    def _check_may_change(self) -> None:
        if not self._config.model_control:
            raise invalid("models are changed over HTTP only if FARSIGHT_MODEL_CONTROL is true", code="no_control")
        if self._config.replicas > 1:
            raise invalid(
                f"this service has {self._config.replicas} replicas, and a request reaches one of them; change "
                "`models` in the deployment's user_config instead"
            )

    def _config_of(self, name: str) -> ModelConfig:
        """The configuration of a model that may be loaded by name: a caller never gives a path."""
        entry = self._registry.entries().get(name)
        known = {config.name: config for config in self._config.models} | ({name: entry.config} if entry else {})
        if name in known:
            return known[name]
        repository = self._config.model_repository
        names = [folder.name for folder in sorted(repository.iterdir()) if folder.is_dir()] if repository else []
        if repository is None or name not in names:
            there = ", ".join([*known, *names]) or "none"
            raise FarsightError(
                Kind.NOT_FOUND, f"model {name[:96]!r} is unknown; available: {there}", code="model_not_found"
            )
        _check_inside(repository, name)
        try:
            # not required: an attempt that fails must not take the service out of rotation
            return ModelConfig(name=name, path=str(repository / name), required=False)
        except ValidationError as error:
            raise invalid(f"model {name[:96]!r}: {error.errors()[0]['msg']}", param="model") from error


def _check_inside(repository: Path, name: str) -> None:
    """Raises FarsightError (422) for a folder with links out of the repository: whoever may write there would choose
    which of the service's files are read."""
    root, folder = repository.resolve(), repository / name
    for path in (folder, *folder.rglob("*")):
        if not path.resolve().is_relative_to(root):
            link = path.relative_to(repository)
            raise invalid(f"model {name!r}: {link} is a link out of the model repository", param="model")
