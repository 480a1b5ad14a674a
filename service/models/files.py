"""Where a model's files are, and which task they are for. Without torch: a wrong path is reported before startup."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from service.config import ModelConfig
from service.core.options import ModelTask

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# last part of a class name in config.json's `architectures`: the task of such a model
HEADS: dict[str, ModelTask] = {
    "ForSequenceClassification": "classify",
    "ForImageClassification": "classify",
    "ForCausalLM": "score",
    "LMHeadModel": "score",
    "ForConditionalGeneration": "score",
}


def directory_of(config: ModelConfig) -> Path:
    """The model's directory: its path, or the folder `model/` of an installed package (which is not imported).

    Raises FileNotFoundError that names the missing package or file.
    """
    if config.path is not None:
        directory = Path(config.path)
    else:
        assert config.package is not None, "bug: ModelConfig without path or package"
        spec = importlib.util.find_spec(config.package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"model {config.name!r}: package {config.package!r} is not installed")
        directory = Path(spec.submodule_search_locations[0]) / "model"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model {config.name!r}: {directory / 'config.json'} is missing")
    if not any((directory / file).is_file() for file in WEIGHTS):
        raise FileNotFoundError(
            f"model {config.name!r}: {directory / WEIGHTS[0]} is missing (weights are read from safetensors only)"
        )
    if not takes_images(read_json(directory / "config.json")) and not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(f"model {config.name!r}: {directory / 'tokenizer.json'} is missing")
    return directory


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; {} if the file is missing. Raises ValueError if it is not a JSON object."""
    if not file.is_file():
        return {}
    values = json.loads(file.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def takes_images(config: dict[str, Any]) -> bool:
    """Whether a model with this config.json takes images instead of text."""
    return "image_size" in config and "patch_size" in config and "vocab_size" not in config


def task_of(directory: Path) -> ModelTask:
    """The task that the files declare: `embed` if sentence-transformers wrote them, else by the class of the head.

    Raises ValueError if config.json is not a JSON object.
    """
    config = read_json(directory / "config.json")
    if (directory / "modules.json").is_file():
        return "embed"
    name = next(iter(config.get("architectures") or []), "")
    for suffix, task in HEADS.items():
        if name.endswith(suffix):
            has_one_label = len(config.get("id2label") or {}) == 1 or config.get("num_labels") == 1
            return "rerank" if task == "classify" and has_one_label else task
    return "embed"
