"""Where a model's files are, and which task they are for. Without torch: a wrong path is reported before startup."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from service.config import ModelConfig
from service.core.options import ModelTask

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# any of them makes a tokenizer
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
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

    Raises FileNotFoundError that names the missing package or file; ValueError for a model of images without patches.
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
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"model {config.name!r}: an adapter (adapter_config.json) is not supported; merge it first")
    has_tokenizer = any((directory / file).is_file() for file in VOCABULARIES)
    settings = read_json(directory / "config.json")
    if takes_text(settings) and not has_tokenizer:
        kind = settings.get("model_type")
        if {"num_mel_bins", "conv_stride", "mask_time_prob"} & set(settings):
            raise ValueError(f"model {config.name!r}: {kind} takes audio; of such models Whisper's encoder is served")
        if "num_channels" in settings:
            raise ValueError(f"model {config.name!r}: {kind} takes images, and has no patches of one size to attend to")
        first, *others = VOCABULARIES
        raise FileNotFoundError(
            f"model {config.name!r}: {directory / first} is missing, and so are {', '.join(others)}"
        )
    return directory


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; {} if the file is missing. Raises ValueError if it is not a JSON object."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def takes_images(config: dict[str, Any]) -> bool:
    """Whether a model with this config.json takes images instead of text."""
    return "image_size" in config and "patch_size" in config


def takes_audio(config: dict[str, Any]) -> bool:
    """Whether a model with this config.json takes audio: Whisper, of which the encoder is served."""
    return config.get("model_type") == "whisper"


def takes_text(config: dict[str, Any]) -> bool:
    """Whether a model with this config.json takes neither images nor audio."""
    return not takes_images(config) and not takes_audio(config)


def task_of(directory: Path) -> ModelTask:
    """The task that the files declare: `embed` if an embedder of sentence-transformers, else by the class of the head.

    Raises ValueError if the files are not JSON, or are for a task that is not served.
    """
    config = read_json(directory / "config.json")
    if (directory / "modules.json").is_file() and _is_embedder(directory):
        return "embed"
    if takes_audio(config):
        return "embed"
    name = next(iter(config.get("architectures") or []), "")
    for suffix, task in HEADS.items():
        if name.endswith(suffix):
            has_one_label = (config.get("num_labels") or len(config.get("id2label") or {})) == 1
            return "rerank" if task == "classify" and has_one_label else task
    return "embed"


def _is_embedder(directory: Path) -> bool:
    """Whether modules.json describes an embedder; False: a CrossEncoder, which is its Transformer alone."""
    kind = read_json(directory / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if kind == "SentenceTransformer":
        return True
    if kind != "CrossEncoder":
        raise ValueError(f"config_sentence_transformers.json: a {kind} is not served")
    if others := [name for name, _ in module_types(directory)[1:]]:
        raise ValueError(f"modules.json: {others} of a CrossEncoder are not supported")
    return False


def module_types(directory: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module in modules.json, in order.

    Raises ValueError if there is none, or one is not sentence-transformers' own: its code would come with the model.
    """
    modules = json.loads((directory / "modules.json").read_text())
    if not isinstance(modules, list) or not modules:
        raise ValueError("modules.json: expected a list of modules")
    found = []
    for module in modules:
        library, _, name = str(module.get("type", "")).rpartition(".")
        if library.partition(".")[0] != "sentence_transformers":
            raise ValueError(f"modules.json: {module.get('type')!r} is not a module of sentence-transformers")
        folder = str(module.get("path", ""))
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"modules.json: {folder!r} is outside of the directory")
        found.append((name, folder))
    return found
