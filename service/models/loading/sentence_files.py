"""What the files of sentence-transformers say about a model, in both layouts: before and since its version 5.4.

Whatever they ask for is applied, or refused by name; nothing is ignored in silence. The library itself is not imported:
that takes six seconds. Tests compare with it. Ref: sentence-transformers 6.2, `base/modules/transformer.py`,
`sentence_transformer/modules/pooling.py`, `cross_encoder/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from service.models.files import module_types, read_json
from service.models.loading.vector_steps import STEPS, read_step
from service.models.tasks.embed import Normalize, Pooling, PoolMode

TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
TASKS = {"embed": "feature-extraction", "classify": "sequence-classification", "rerank": "sequence-classification"}
OUTPUTS = ("last_hidden_state", "logits")
ARGUMENTS = tuple(
    f"{what}_{suffix}" for what in ("model", "tokenizer", "processor", "config") for suffix in ("args", "kwargs")
)
# arguments that change nothing here: the service sets the first three, and never pads
OWN_ARGUMENTS = {"attn_implementation", "torch_dtype", "dtype", "trust_remote_code", "padding_side"}
IGNORED = {"unpad_inputs", "module_output_name"}  # how the library computes, not what
QUERY_SETTINGS = ("query_length", "document_length", "query_expansion")  # of models with many vectors
# settings of the Pooling module before 5.4, in the order in which their vectors are joined
MODES: dict[str, PoolMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLING_SETTINGS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *MODES}
ACTIVATIONS = ("Identity", "Sigmoid")


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """The settings of one directory."""

    max_length: int | None  # tokens
    lower_case: bool  # of all text
    prompts: Mapping[str, str]
    default_prompt: str | None  # name of the prompt that is applied if a request names none
    pooling: Pooling
    activation: str | None  # of a head's logits: "Identity" or "Sigmoid"; None: nothing is stored


def read_sentence_files(directory: Path, task: str) -> SentenceFiles:
    """What the files of `directory` say for `task`.

    Raises ValueError that names the module or the setting that is not supported; FileNotFoundError.
    """
    transformer = next(filter(None, (read_json(directory / name) for name in TRANSFORMER_FILES)), {})
    max_length, lower_case = _transformer(transformer, task)
    general = read_json(directory / "config_sentence_transformers.json")
    prompts, default_prompt = _prompts(general, task)
    has_modules = (directory / "modules.json").is_file()
    return SentenceFiles(
        max_length=max_length,
        lower_case=lower_case,
        prompts=prompts,
        default_prompt=default_prompt,
        pooling=_pooling(directory) if has_modules and task == "embed" else Pooling(steps=(Normalize(),)),
        activation=_activation(general, read_json(directory / "config.json")),
    )


def _transformer(settings: dict[str, Any], task: str) -> tuple[int | None, bool]:
    """(tokens of one input, lower case) of the Transformer module."""
    settings = dict(settings)
    max_length, lower_case = settings.pop("max_seq_length", None), bool(settings.pop("do_lower_case", False))
    for name in ARGUMENTS:
        arguments = dict(settings.pop(name, None) or {})
        max_length = arguments.pop("model_max_length", max_length)
        if unknown := arguments.keys() - OWN_ARGUMENTS:
            raise ValueError(f"{TRANSFORMER_FILES[0]}: {name} asks for {sorted(unknown)}, which is not supported")
    declared = settings.pop("transformer_task", None)
    if declared is not None and task in TASKS and declared != TASKS[task]:
        raise ValueError(f"{TRANSFORMER_FILES[0]}: transformer_task: expected {TASKS[task]!r}, got {declared!r}")
    _check_modality(settings.pop("modality_config", None))
    for name in QUERY_SETTINGS:
        if settings.pop(name, None) is not None:
            raise ValueError(f"{TRANSFORMER_FILES[0]}: {name} is for models with many vectors, which are not served")
    for kind, changes in (settings.pop("processing_kwargs", None) or {}).items():
        if changes:
            raise ValueError(f"{TRANSFORMER_FILES[0]}: processing_kwargs of {kind} are not supported")
    if unknown := settings.keys() - IGNORED:
        raise ValueError(f"{TRANSFORMER_FILES[0]}: {sorted(unknown)} are not supported")
    return max_length, lower_case


def _check_modality(modality: dict[str, Any] | None) -> None:
    """Text must be the model's own forward pass; other modalities are not asked for."""
    if modality is None:
        return
    if "message" in modality:
        raise ValueError(f"{TRANSFORMER_FILES[0]}: texts as messages of a chat template are not supported")
    text = modality.get("text", {})
    if text.get("method") != "forward" or text.get("method_output_name") not in OUTPUTS:
        raise ValueError(f"{TRANSFORMER_FILES[0]}: expected text by forward and {OUTPUTS}, got {text or 'no text'}")


def _prompts(general: dict[str, Any], task: str) -> tuple[dict[str, str], str | None]:
    """(prompts by name, name of the default one). Empty prompts are kept: they replace the default one."""
    prompts = {str(name): str(text or "") for name, text in (general.get("prompts") or {}).items()}
    default = general.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(f"default_prompt_name {default!r} is not one of the prompts {sorted(prompts)}")
    if default is not None and prompts[default] and task != "embed":
        raise ValueError(f"the default prompt {default!r} of a model for {task} is not supported")
    return prompts, default


def _activation(general: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The stored activation of a CrossEncoder: by version 5.4, by version 4, by version 3."""
    stored = config.get("sentence_transformers") or {}
    names = (
        general.get("activation_fn"),
        stored.get("activation_fn") if isinstance(stored, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    path = next((name for name in names if name is not None), None)
    if path is None:
        return None
    library, _, name = str(path).rpartition(".")
    if name not in ACTIVATIONS or library.partition(".")[0] != "torch":
        raise ValueError(f"the stored activation {path!r} is not supported; {' and '.join(ACTIVATIONS)} are")
    return name


def _pooling(directory: Path) -> Pooling:
    """The Pooling module of an embedder, and the modules after it."""
    transformer, *others = module_types(directory)
    if transformer[0] != "Transformer" or transformer[1] not in ("", "."):
        raise ValueError(f"modules.json begins with {transformer[0]} in {transformer[1]!r}, not with a Transformer")
    if not others or others[0][0] != "Pooling":
        raise ValueError("modules.json has no Pooling after its Transformer")
    if unknown := {name for name, _ in others[1:]} - STEPS.keys():
        raise ValueError(f"modules.json asks for {sorted(unknown)}; supported after Pooling: {sorted(STEPS)}")
    file = directory / others[0][1] / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{others[0][1]}/config.json of Pooling is missing")
    settings = read_json(file)
    if unknown := settings.keys() - POOLING_SETTINGS:
        raise ValueError(f"Pooling: {sorted(unknown)} are not supported")
    steps: list[nn.Module] = []
    for name, folder in others[1:]:
        steps += read_step(name, directory / folder)
    return Pooling(_modes(settings), tuple(steps), bool(settings.get("include_prompt", True)))


def _modes(settings: dict[str, Any]) -> tuple[PoolMode, ...]:
    given = settings.get("pooling_mode")
    if given is None:
        given = [mode for name, mode in MODES.items() if settings.get(name)] or ["mean"]
    modes = (given,) if isinstance(given, str) else tuple(given)
    if unknown := set(modes) - set(get_args(PoolMode)):
        raise ValueError(f"Pooling: mode {sorted(map(str, unknown))} is not one of {sorted(get_args(PoolMode))}")
    return cast("tuple[PoolMode, ...]", modes)
