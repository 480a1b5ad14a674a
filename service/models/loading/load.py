"""Loads a model from a local Hugging Face directory: safetensors only, no remote code, no downloads.

A loaded model is verified (`verify.py`): a few tokens run through Transformers' eager attention and through ours. A
model whose results differ is refused; one whose packed results differ runs in batches of equal length. Then it is
measured (`measure.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.utils.logging import disable_progress_bar

from service.config import ModelConfig
from service.core.model_info import MatrixSizes, ModelInfo
from service.core.options import ModelTask
from service.models import hook
from service.models.files import directory_of, read_json, takes_images, task_of
from service.models.heads import packed_classifier
from service.models.inputs.processor import InputProcessor
from service.models.inputs.spec import InputSpec
from service.models.inputs.tokenizer import read_tokenizer
from service.models.loading.measure import counted, warmed
from service.models.loading.rope import may_pack, rope_resets
from service.models.loading.verify import verified
from service.models.model import Model
from service.models.preemption import install_checkpoints
from service.models.tasks import embed

DEFAULT_MAX_LENGTH = 512  # tokens, if neither the files nor the model's positions have a limit


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The service's settings that models depend on."""

    device: torch.device
    max_text_bytes: int
    max_batch_tokens: int


def load(config: ModelConfig, settings: LoadSettings) -> Model:
    """A verified and measured model on the device.

    Raises FileNotFoundError for missing files, ValueError for files or settings that do not fit together, RuntimeError
    for a model whose results differ from Transformers'; other errors of Transformers for damaged files.
    """
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    source = _read_source(config)
    module: Any = _read_module(source).to(settings.device).eval()
    install_checkpoints(module)
    base = module.get_encoder() if source.hf_config.is_encoder_decoder else module.base_model
    positions, first_position = _positions(source.hf_config, base)
    spec = _input_spec(source, settings, positions)
    model = Model(
        info=_info(source, module, base, spec),
        inputs=InputProcessor(spec),
        module=module,
        base=base,
        device=settings.device,
        pooling=_pooling(source),
        classifier=packed_classifier(module) if source.task in ("classify", "rerank") else None,
        first_position=first_position,
        max_batch_tokens=settings.max_batch_tokens,
        resets=tuple(rope_resets(module)),
    )
    return warmed(counted(verified(model)))


# -- from files to a module -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What the service's configuration and the model's files say, before the weights are read."""

    config: ModelConfig
    directory: Path
    hf_config: PretrainedConfig
    task: ModelTask

    @property
    def takes_images(self) -> bool:
        return takes_images(self.hf_config.to_dict())


def _read_source(config: ModelConfig) -> _Source:
    directory = directory_of(config)
    hf_config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.rope_scaling is not None:
        _scale_rope(config.name, hf_config, config.rope_scaling)
    return _Source(config, directory, hf_config, config.task or task_of(directory))


def _scale_rope(model: str, hf_config: PretrainedConfig, rope_scaling: dict[str, Any]) -> None:
    """Set the rotary scaling of `hf_config`, and the positions that it then has."""
    given = dict(rope_scaling)
    if "type" in given:  # as older files spell it
        given["rope_type"] = given.pop("type")
    if "rope_type" not in given:
        raise ValueError(f"model {model!r}: rope_scaling needs a rope_type (linear, dynamic, yarn, ...)")
    present = getattr(hf_config, "rope_parameters", None)
    if not isinstance(present, dict) or "rope_theta" not in present:
        raise ValueError(f"model {model!r}: rope_scaling: {hf_config.model_type} has no rotary positions")
    scaling = {"original_max_position_embeddings": hf_config.max_position_embeddings, **given}
    hf_config.rope_parameters = {**present, **scaling}
    # dynamic frequencies grow once a sequence is over the model's own length, so that length must stay as it is
    if "factor" in scaling and scaling["rope_type"] != "dynamic":
        hf_config.max_position_embeddings = int(scaling["original_max_position_embeddings"] * scaling["factor"])


def _read_module(source: _Source) -> nn.Module:
    module, info = _auto_class(source).from_pretrained(
        source.directory,
        config=source.hf_config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, source.config.dtype),
        attn_implementation=hook.NAME,
        output_loading_info=True,
    )
    # missing weights would be random numbers; a pooler may be missing if it is not used
    missing = [name for name in info["missing_keys"] if source.task != "embed" or "pooler" not in name]
    if missing:
        name, count = source.config.name, len(missing)
        raise ValueError(f"model {name!r}: its files lack {count} weights for {source.task}: {missing[0]}, ...")
    found: nn.Module = module
    return found


def _auto_class(source: _Source) -> Any:
    match source.task:
        case "embed":
            return AutoModel
        case "classify" | "rerank":
            return AutoModelForImageClassification if source.takes_images else AutoModelForSequenceClassification
        case "score":
            return AutoModelForSeq2SeqLM if source.hf_config.is_encoder_decoder else AutoModelForCausalLM


# -- from files to what a model says of itself ------------------------------------------------------------------


def _positions(hf_config: PretrainedConfig, base: nn.Module) -> tuple[int | None, int]:
    """(number of positions, number of the first). None: no limit, as with T5's relative positions.

    RoBERTa's positions begin after its padding id.
    """
    embeddings = getattr(base, "embeddings", None)
    first = hf_config.pad_token_id + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    count = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if count is not None and rope.get("rope_type") == "dynamic":
        count *= rope.get("factor", 1.0)
    return (None if count is None else int(count) - first), first


def _input_spec(source: _Source, settings: LoadSettings, positions: int | None) -> InputSpec:
    config, hf_config = source.config, source.hf_config
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(f"model {config.name!r}: max_length {config.max_length} is over its {positions} positions")
    if source.takes_images:
        from service.models.inputs.image import read_processor

        processor = read_processor(source.directory, hf_config)
        patches = (processor.size[0] // hf_config.patch_size) * (processor.size[1] // hf_config.patch_size) + 1
        return InputSpec(config.name, patches, 0, settings.max_text_bytes, image_processor=processor, patches=patches)
    return InputSpec(
        model=config.name,
        max_length=config.max_length or _declared_length(source.directory, positions),
        vocab_size=hf_config.get_text_config().vocab_size,
        max_text_bytes=settings.max_text_bytes,
        tokenizer=read_tokenizer(source.directory),
        has_types=getattr(hf_config, "type_vocab_size", 0) > 1,
        has_target=bool(hf_config.is_encoder_decoder) and source.task == "score",
    )


def _declared_length(directory: Path, positions: int | None) -> int:
    """Tokens: the smallest of what the sentence-transformers and tokenizer files declare and the model's positions."""
    declared = [
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
        positions,
    ]
    lengths = [int(length) for length in declared if isinstance(length, int | float) and 0 < length < 1e9]
    return min(lengths) if lengths else DEFAULT_MAX_LENGTH


def _pooling(source: _Source) -> embed.Pooling:
    if source.config.pooling is not None:
        has_files = (source.directory / "modules.json").is_file()
        normalize = embed.read_pooling(source.directory).normalize if has_files else True
        return embed.Pooling(source.config.pooling, normalize)
    if source.takes_images:
        return embed.Pooling("cls", normalize=True)
    return embed.read_pooling(source.directory)


def _info(source: _Source, module: Any, base: nn.Module, spec: InputSpec) -> ModelInfo:
    """Without what passes show: matrices, attention layers and the shortest pass (`measure.py`)."""
    config, hf_config, task = source.config, source.hf_config, source.task
    text = hf_config.get_text_config()
    names: Any = hf_config.id2label
    if task == "rerank" and len(names) != 1:
        raise ValueError(f"model {config.name!r}: rerank needs one label, this model has {len(names)}")
    labels = tuple(str(names[at]) for at in range(len(names))) if task in ("classify", "rerank") else ()
    return ModelInfo(
        name=config.name,
        task=task,
        architecture=hf_config.model_type,
        dtype=config.dtype,
        max_length=spec.max_length,
        dimensions=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=spec.vocab_size,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        weights=MatrixSizes(0),
        task_weights=MatrixSizes(0),
        position_bias=hasattr(hf_config, "relative_attention_num_buckets"),
        attention=(),
        packed=may_pack(hf_config, base),
        inputs="image" if spec.image_processor else "source and target" if spec.has_target else "text",
        labels=labels,
    )
