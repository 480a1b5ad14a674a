"""The models that are served: loaded, replaced and removed one by one; one that cannot load says why, others serve."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that the service knows of. `model` is what answers, also while its next version loads."""

    config: ModelConfig
    state: State
    reason: str = ""
    model: Model | None = None


class Registry:
    """Changed by one thread at a time (whoever loads); read by any."""

    def __init__(self, settings: LoadSettings, loader: Callable[[ModelConfig, LoadSettings], Model] = load) -> None:
        self._settings = settings
        self._load = loader
        self._entries: dict[str, Entry] = {}

    def load(self, config: ModelConfig) -> Entry:
        """Serve this model, in place of the one of its name once it is proven. A failure leaves that one serving."""
        before = self._entries.get(config.name)
        answering = before.model if before else None
        self._put(Entry(config, "LOADING", model=answering))
        start = time.perf_counter()
        try:
            model = self._load(config, self._settings)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one model's files, the others serve)
            logger.error("model %s cannot be loaded: %s: %s", config.name, type(error).__name__, error)
            reason = _told(error, config)
            entry = Entry(config, "UNAVAILABLE", reason)
            if before is not None and answering is not None:
                entry = replace(
                    before, state="READY", reason=f"its reload failed, the one before still serves: {reason}"
                )
        else:
            logger.info(
                "model %s is ready after %.1f s: %s, %s, %d parameters, %s on %s",
                config.name, time.perf_counter() - start, model.info.architecture, model.info.task,
                model.info.parameters, model.info.dtype, model.device,
            )  # fmt: skip
            entry = Entry(config, "READY", model=model)
        self._put(entry)
        return entry

    def unload(self, name: str) -> None:
        """New requests are refused; those that have begun keep their model until they end."""
        entry = self.entry(name)
        self._put(Entry(entry.config, "UNAVAILABLE", "unloaded"))

    def set(self, configs: Sequence[ModelConfig]) -> None:
        """Serve exactly these: what is new or changed is loaded, what is left out is forgotten."""
        for config in configs:
            known = self._entries.get(config.name)
            if known is None or known.config != config or known.state != "READY":
                self.load(config)
        names = {config.name for config in configs}
        self._entries = {name: entry for name, entry in self._entries.items() if name in names}

    def _put(self, entry: Entry) -> None:
        self._entries = {**self._entries, entry.config.name: entry}  # readers on other threads see one or the other

    def entries(self) -> dict[str, Entry]:
        return dict(self._entries)

    def entry(self, name: str) -> Entry:
        """Raises NOT_FOUND, naming what there is."""
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
        """The model that answers. Raises NOT_FOUND, or UNAVAILABLE with the reason."""
        entry = self.entry(name)
        if entry.model is None:
            reason = entry.reason or "it is being loaded"
            raise FarsightError(
                Kind.UNAVAILABLE, f"model {name!r} is not ready: {reason}", retry_after_s=5.0, param="model"
            )
        return entry.model

    def infos(self) -> tuple[ModelInfo, ...]:
        """Of the models that answer."""
        return tuple(entry.model.info for entry in self._entries.values() if entry.model is not None)

    @property
    def missing(self) -> dict[str, str]:
        """Why required models do not answer."""
        return {
            name: entry.reason or "it is being loaded"
            for name, entry in self._entries.items()
            if entry.model is None and entry.config.required and entry.reason != "unloaded"
        }


def _told(error: Exception, config: ModelConfig) -> str:
    """The reason as callers may see it: without the paths of this machine; the log has them."""
    text = f"{type(error).__name__}: {error}"
    if config.path is not None:
        text = text.replace(config.path, "...")
    return re.sub(r"(?:/[\w.@+-]+){2,}", "...", text)[:300]
