"""Where a model's files are; no torch, so that a wrong path is told before anything is started."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from service.config import ModelConfig

REQUIRED = ("config.json", "tokenizer.json", "model.safetensors")


def directory_of(config: ModelConfig) -> Path:
    """The model's folder: its path, or the folder `model/` of an installed package (which is not imported)."""
    if config.path is not None:
        directory = Path(config.path)
    else:
        assert config.package is not None, "bug: ModelConfig without path or package"
        spec = importlib.util.find_spec(config.package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"model {config.name!r}: package {config.package!r} is not installed")
        directory = Path(spec.submodule_search_locations[0]) / "model"
    for file in REQUIRED:
        if not (directory / file).is_file():
            raise FileNotFoundError(f"model {config.name!r}: {directory / file} is missing")
    return directory
