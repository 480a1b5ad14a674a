"""The models that are served. They are loaded, replaced and removed one at a time; one that fails to load has a reason,
and the others serve."""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from service.config import ModelConfig
from service.core.model_info import ModelInfo
from service.errors import FarsightError, Kind
from service.models.loading.load import LoadSettings, load
from service.models.model import Model

logger = logging.getLogger("farsight")

State = Literal["LOADING", "READY", "UNAVAILABLE"]  # as the Open Inference Protocol's repository names them
MAX_REASON = 300  # characters


@dataclass(frozen=True, slots=True)
class Entry:
    """One configured model. `model` is the version that serves, also while its next version loads."""

    config: ModelConfig
    state: State
    reason: str = ""
    model: Model | None = None


class Registry:
    """Changed by one thread at a time (the loader's), read by any."""

    def __init__(self, settings: LoadSettings, loader: Callable[[ModelConfig, LoadSettings], Model] = load) -> None:
        self._settings = settings
        self._load = loader
        self._entries: dict[str, Entry] = {}

    def load(self, config: ModelConfig) -> Entry:
        """Load a model and serve it instead of the one of its name. If that fails, the previous one keeps serving."""
        before = self._entries.get(config.name)
        serving = before.model if before else None
        self._put(Entry(config, "LOADING", model=serving))
        start = time.perf_counter()
        try:
            model = self._load(config, self._settings)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one model's files, the others serve)
            logger.error("model %s cannot be loaded: %s: %s", config.name, type(error).__name__, error)
            reason = _public_reason(error, config)
            entry = Entry(config, "UNAVAILABLE", reason)
            if before is not None and serving is not None:
                reason = f"its reload failed, the previous version still serves: {reason}"
                entry = replace(before, state="READY", reason=reason)
        else:
            logger.info(
                "model %s is ready after %.1f s: %s, %s, %d parameters, %s on %s",
                config.name, time.perf_counter() - start, model.info.architecture, model.info.task,
                model.info.parameters, model.info.dtype, model.device,
            )  # fmt: skip
            entry = Entry(config, "READY", model=model)
        self._put(entry)
        before = serving = None
        gc.collect()  # what was replaced, and what loading has left, are cycles: the next collection may be hours away
        return entry

    def unload(self, name: str) -> None:
        """Refuse new requests for a model; those that have begun keep it until they end. Raises NOT_FOUND."""
        entry = self.entry(name)
        self._put(Entry(entry.config, "UNAVAILABLE", "unloaded"))
        del entry
        gc.collect()

    def set(self, configs: Sequence[ModelConfig]) -> None:
        """Serve exactly these models: load new and changed ones, forget all others."""
        for config in configs:
            known = self._entries.get(config.name)
            if known is None or known.config != config or known.state != "READY":
                self.load(config)
        names = {config.name for config in configs}
        self._entries = {name: entry for name, entry in self._entries.items() if name in names}

    def _put(self, entry: Entry) -> None:
        self._entries = {**self._entries, entry.config.name: entry}  # a new dict: other threads read without a lock

    def entries(self) -> dict[str, Entry]:
        """All configured models by name."""
        return dict(self._entries)

    def entry(self, name: str) -> Entry:
        """One configured model. Raises NOT_FOUND with the names of the configured ones."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise FarsightError(
                Kind.NOT_FOUND,
                f"model {name[:96]!r} is not served; known: {known}",
                code="model_not_found",
                param="model",
            )
        return entry

    def model(self, name: str) -> Model:
        """The model that serves under this name. Raises NOT_FOUND, or UNAVAILABLE with the reason."""
        entry = self.entry(name)
        if entry.model is None:
            reason = _why_missing(entry)
            raise FarsightError(
                Kind.UNAVAILABLE, f"model {name!r} is not ready: {reason}", retry_after_s=5.0, param="model"
            )
        return entry.model

    def infos(self) -> tuple[ModelInfo, ...]:
        """Descriptions of the models that serve."""
        return tuple(entry.model.info for entry in self._entries.values() if entry.model is not None)

    @property
    def missing(self) -> dict[str, str]:
        """Required models that do not serve, by name, with the reason; unloaded ones are not missing."""
        return {
            name: _why_missing(entry)
            for name, entry in self._entries.items()
            if entry.model is None and entry.config.required and entry.reason != "unloaded"
        }


def _why_missing(entry: Entry) -> str:
    return entry.reason or "it is being loaded"


def _public_reason(error: Exception, config: ModelConfig) -> str:
    """The reason that callers see: without paths of this machine, which only the log has."""
    text = f"{type(error).__name__}: {error}"
    if config.path is not None:
        text = text.replace(config.path, "...")
    return re.sub(r"(?:/[\w.@+-]+){2,}", "...", text)[:MAX_REASON]
