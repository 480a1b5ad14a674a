"""Models from local Hugging Face directories: safetensors only, no remote code, nothing fetched, and none unproven.

At load a model runs a few tokens through Transformers' own eager attention and through ours. What differs is refused;
a model that cannot take packed sequences runs in batches of equal length, and says so.
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
from service.models import heads, hook
from service.models import preemption as slices
from service.models.files import directory_of, read_json, takes_images, task_of
from service.models.inputs.processor import Inputs
from service.models.inputs.tokenizer import read_tokenizer
from service.models.loading.measure import warmed
from service.models.loading.rope import may_pack, rope_resets
from service.models.loading.verify import verified
from service.models.model import Model
from service.models.tasks import embed


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What of the service's configuration concerns models."""

    device: torch.device
    max_text_bytes: int
    max_batch_tokens: int


def load(config: ModelConfig, settings: LoadSettings) -> Model:
    """One model, proven on the device. Raises ValueError, OSError or RuntimeError that say what is wrong with it."""
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = directory_of(config)
    hf = _configuration(config, directory)
    task = config.task or task_of(directory)
    module: Any = _module(config, directory, hf, task).to(settings.device).eval()
    slices.install(module)
    base = module.get_encoder() if hf.is_encoder_decoder else module.base_model
    positions, first_position = _positions(hf, base)
    inputs = _inputs(config, directory, hf, task, settings, positions)
    model = Model(
        info=_info(config, hf, module, base, task, inputs),
        inputs=inputs,
        module=module,
        base=base,
        device=settings.device,
        pooling=_pooling(config, directory, hf),
        classifier=heads.classifier_of(module) if task in ("classify", "rerank") else None,
        first_position=first_position,
        max_batch_tokens=settings.max_batch_tokens,
        resets=tuple(rope_resets(module)),
    )
    return warmed(verified(model))


# -- files to modules -------------------------------------------------------------------------------------------


def _configuration(config: ModelConfig, directory: Path) -> PretrainedConfig:
    hf: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.rope_scaling is not None:
        given = dict(config.rope_scaling)
        if "type" in given:  # as older files spell it
            given["rope_type"] = given.pop("type")
        if "rope_type" not in given:
            raise ValueError(f"model {config.name!r}: rope_scaling needs a rope_type (linear, dynamic, yarn, ...)")
        kept = getattr(hf, "rope_parameters", None)
        if not isinstance(kept, dict) or "rope_theta" not in kept:
            raise ValueError(f"model {config.name!r}: rope_scaling: {hf.model_type} has no rotary positions")
        scaling = {"original_max_position_embeddings": hf.max_position_embeddings, **given}
        hf.rope_parameters = {**kept, **scaling}
        # dynamic frequencies grow where a sequence is over the model's own length, which must stay told
        if "factor" in scaling and scaling["rope_type"] != "dynamic":
            hf.max_position_embeddings = int(scaling["original_max_position_embeddings"] * scaling["factor"])
    return hf


def _module(config: ModelConfig, directory: Path, hf: PretrainedConfig, task: ModelTask) -> nn.Module:
    module, info = _auto_class(hf, task).from_pretrained(
        directory,
        config=hf,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, config.dtype),
        attn_implementation=hook.NAME,
        output_loading_info=True,
    )
    # what the files lack would be random numbers; an unused pooler may be missing
    missing = [name for name in info["missing_keys"] if task != "embed" or "pooler" not in name]
    if missing:
        raise ValueError(f"model {config.name!r}: its files lack {len(missing)} weights for {task}: {missing[0]}, ...")
    found: nn.Module = module
    return found


def _auto_class(hf: PretrainedConfig, task: ModelTask) -> Any:
    match task:
        case "embed":
            return AutoModel
        case "classify" | "rerank":
            return AutoModelForImageClassification if takes_images(hf.to_dict()) else AutoModelForSequenceClassification
        case "score":
            return AutoModelForSeq2SeqLM if hf.is_encoder_decoder else AutoModelForCausalLM


def _positions(hf: PretrainedConfig, base: nn.Module) -> tuple[int | None, int]:
    """(tokens that the model has positions for, the first position's number). RoBERTa's positions begin after its
    padding id; T5's are relative and have no end."""
    embeddings = getattr(base, "embeddings", None)
    first = hf.pad_token_id + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    count = getattr(hf, "max_position_embeddings", None)
    rope = getattr(hf, "rope_parameters", None) or {}
    if count is not None and rope.get("rope_type") == "dynamic":
        count *= rope.get("factor", 1.0)
    return (None if count is None else int(count) - first), first


def _inputs(
    config: ModelConfig,
    directory: Path,
    hf: PretrainedConfig,
    task: ModelTask,
    settings: LoadSettings,
    positions: int | None,
) -> Inputs:
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(f"model {config.name!r}: max_length {config.max_length} is over its {positions} positions")
    common: dict[str, Any] = {"model": config.name, "max_text_bytes": settings.max_text_bytes}
    if takes_images(hf.to_dict()):
        from service.models.inputs.image import read_processor

        processor = read_processor(directory, hf)
        patches = (processor.size[0] // hf.patch_size) * (processor.size[1] // hf.patch_size) + 1
        return Inputs(**common, max_length=patches, vocab_size=0, images=processor, patches=patches)
    return Inputs(
        **common,
        max_length=config.max_length or _declared_length(directory, positions),
        vocab_size=hf.get_text_config().vocab_size,
        tokenizer=read_tokenizer(directory),
        has_types=getattr(hf, "type_vocab_size", 0) > 1,
        has_target=bool(hf.is_encoder_decoder) and task == "score",
    )


def _declared_length(directory: Path, positions: int | None) -> int:
    """What the tokenizer's or the sentence-transformers file declares, within what the model has positions for."""
    declared = [
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
        positions,
    ]
    lengths = [int(one) for one in declared if isinstance(one, int | float) and 0 < one < 1e9]
    return min(lengths) if lengths else 512


def _pooling(config: ModelConfig, directory: Path, hf: PretrainedConfig) -> embed.Pooling:
    if config.pooling is not None:
        declared = embed.read_pooling(directory).normalize if (directory / "modules.json").is_file() else True
        return embed.Pooling(config.pooling, normalize=declared)
    if takes_images(hf.to_dict()):
        return embed.Pooling("cls", normalize=True)
    return embed.read_pooling(directory)


def _info(
    config: ModelConfig, hf: PretrainedConfig, module: Any, base: nn.Module, task: ModelTask, inputs: Inputs
) -> ModelInfo:
    text = hf.get_text_config()
    names: Any = hf.id2label
    if task == "rerank" and len(names) != 1:
        raise ValueError(f"model {config.name!r}: rerank needs one label, this model has {len(names)}")
    labels = tuple(str(names[at]) for at in range(len(names))) if task in ("classify", "rerank") else ()
    return ModelInfo(
        name=config.name,
        task=task,
        architecture=hf.model_type,
        dtype=config.dtype,
        max_length=inputs.max_length,
        dimensions=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=inputs.vocab_size,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        weights=MatrixSizes(0),
        task_weights=MatrixSizes(0),  # counted once it runs
        position_bias=hasattr(hf, "relative_attention_num_buckets"),
        attention=(),
        packed=may_pack(hf, base),
        inputs="image" if inputs.images else "source and target" if inputs.has_target else "text",
        labels=labels,
    )


# -- proofs -----------------------------------------------------------------------------------------------------
