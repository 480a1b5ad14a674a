"""Loads a model from a local Hugging Face directory: safetensors only, no remote code, no downloads.

A loaded model is verified (`verify.py`): a few tokens run through Transformers' eager attention and through ours. A
model whose results differ is refused; one whose packed results differ runs in batches of equal length. Then it is
measured (`measure.py`, `gains.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as TEXT_ENCODERS
from transformers.utils.logging import disable_progress_bar

from service.config import Config, ModelConfig
from service.core.model_info import MatrixSizes, ModelInfo
from service.models import hook
from service.models.heads import packed_classifier
from service.models.inputs.processor import InputProcessor
from service.models.inputs.spec import InputSpec
from service.models.inputs.tokenizer import load_tokenizer
from service.models.loading.gains import with_gains
from service.models.loading.input_spec import audio_spec, image_spec, kind_of, text_spec
from service.models.loading.labels import read_labels
from service.models.loading.measure import counted, warmed
from service.models.loading.rope import may_pack, rope_resets, scaled_length
from service.models.loading.source import Source, read_source
from service.models.loading.verify import verified
from service.models.model import Model
from service.models.preemption import install_checkpoints
from service.models.tasks import embed

logger = logging.getLogger("farsight")

# besides TEXT_ENCODERS: encoder-decoder models of which sentence-transformers runs the encoder alone
POOLED_ENCODERS = (
    *("blenderbot", "blenderbot-small", "longt5", "m2m_100", "marian", "pegasus", "pegasus_x", "prophetnet"),
    "switch_transformers",
)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The service's settings that models depend on."""

    device: torch.device
    max_text_bytes: int
    max_batch_tokens: int
    max_audio_windows: int = 1  # of one request
    sparse_min_tokens: int | None = None  # error gains are measured of models with longer inputs; None: of none
    cache_dir: Path | None = None  # where measured gains are kept

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Self:
        sizes = config.max_text_bytes, config.max_batch_tokens, config.max_audio_windows
        return cls(device, *sizes, config.sparse_min_tokens, config.cache_dir)


def load(config: ModelConfig, settings: LoadSettings) -> Model:
    """A verified and measured model on the device.

    Raises FileNotFoundError for missing files, ValueError for files or settings that do not fit together, RuntimeError
    for a model whose results differ from Transformers'; other errors of Transformers for damaged files.
    """
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    source = read_source(config)
    tokenizer = load_tokenizer(source.directory, lower_case=source.files.lower_case) if source.takes_text else None
    module: Any = _read_module(source).to(settings.device).eval()
    install_checkpoints(module)
    base = module.get_encoder() if source.hf_config.is_encoder_decoder else module.base_model
    positions, padding_id = _positions(source, base)
    if source.takes_images:
        spec = image_spec(source, settings.max_text_bytes, settings.device, base)
    elif source.takes_audio:
        spec = audio_spec(source, settings.max_text_bytes)
    else:
        spec = text_spec(source, settings.max_text_bytes, positions, tokenizer, base)
    pooling = _pooling(source)
    model = Model(
        info=_info(source, module, base, spec),
        inputs=InputProcessor(spec, settings.max_audio_windows),
        module=module,
        base=base,
        device=settings.device,
        pooling=replace(pooling, steps=tuple(step.to(settings.device) for step in pooling.steps)),
        classifier=packed_classifier(module) if source.task in ("classify", "rerank") else None,
        activation=source.files.activation,
        first_position=0 if padding_id is None else padding_id + 1,
        padding_id=padding_id,
        max_batch_tokens=settings.max_batch_tokens,
        resets=tuple(rope_resets(module)),
    )
    model = counted(verified(model, tokenizer))
    if settings.sparse_min_tokens is not None and model.info.max_length >= settings.sparse_min_tokens:
        model = with_gains(model, settings.cache_dir)
    return warmed(model)


# -- from files to a module -------------------------------------------------------------------------------------


def _read_module(source: Source) -> nn.Module:
    try:
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
    except KeyError as error:
        if error.args == (hook.NAME,):  # a table of its own implementations of attention
            raise ValueError(f"{source.hf_config.model_type} {hook.OWN_ATTENTION}") from error
        raise
    except SafetensorError as error:
        raise ValueError(f"its weights cannot be read: {type(error).__name__}: {error}") from error
    # missing weights would be random numbers; a pooler may be missing if it is not used
    missing = [name for name in info["missing_keys"] if source.task != "embed" or "pooler" not in name]
    if missing:
        name, count = source.config.name, len(missing)
        raise ValueError(f"model {name!r}: its files lack {count} weights for {source.task}: {missing[0]}, ...")
    found: nn.Module = module
    return found


def _auto_class(source: Source) -> Any:
    match source.task:
        case "embed":
            # such as T5's encoder, whose directory may hold no decoder
            _check_pooled_encoder(source)
            return AutoModelForTextEncoding if source.hf_config.model_type in TEXT_ENCODERS else AutoModel
        case "classify" | "rerank":
            return AutoModelForImageClassification if source.takes_images else AutoModelForSequenceClassification
        case "score":
            return AutoModelForSeq2SeqLM if source.hf_config.is_encoder_decoder else AutoModelForCausalLM


def _check_pooled_encoder(source: Source) -> None:
    """Raises ValueError for an encoder-decoder model whose decoder sentence-transformers would pool."""
    kind, has_modules = source.hf_config.model_type, (source.directory / "modules.json").is_file()
    if has_modules and source.hf_config.is_encoder_decoder and kind not in (*TEXT_ENCODERS, *POOLED_ENCODERS):
        raise ValueError(f"sentence-transformers pools the decoder of {kind} models, which is not supported")


# -- from files to what a model says of itself ------------------------------------------------------------------


def _positions(source: Source, base: nn.Module) -> tuple[int | None, int | None]:
    """(number of positions, id of the padding token that takes none). None: no limit, as with T5's relative positions.

    RoBERTa's positions begin after its padding id. Raises ValueError if such a model has none.
    """
    hf_config = source.hf_config
    count = scaled_length(hf_config)
    if not hasattr(getattr(base, "embeddings", None), "create_position_ids_from_input_ids"):
        return count, None
    padding_id: int | None = hf_config.pad_token_id
    if padding_id is None:
        raise ValueError(f"config.json has no pad_token_id; the positions of {hf_config.model_type} begin after it")
    return (None if count is None else count - padding_id - 1), padding_id


def _pooling(source: Source) -> embed.Pooling:
    """As the files say; `pooling` of the service's configuration replaces the modes alone."""
    pooling = source.files.pooling
    if source.config.pooling is not None:
        modes: dict[str, embed.PoolMode] = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
        return replace(pooling, modes=(modes[source.config.pooling],))
    return replace(pooling, modes=("cls",)) if source.takes_images else pooling


def _info(source: Source, module: Any, base: nn.Module, spec: InputSpec) -> ModelInfo:
    """Without what passes show: matrices, attention layers and the shortest pass (`measure.py`)."""
    config, hf_config, task = source.config, source.hf_config, source.task
    text = hf_config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise ValueError(f"model {config.name!r}: {hf_config.model_type} has no attention heads")
    labels = read_labels(source.directory, hf_config.num_labels or 0) if task in ("classify", "rerank") else ()
    if task == "rerank" and len(labels) != 1:
        raise ValueError(f"model {config.name!r}: rerank needs one label, this model has {len(labels)}")
    return ModelInfo(
        name=config.name,
        task=task,
        architecture=hf_config.model_type,
        dtype=config.dtype,
        max_length=spec.max_length,
        dimensions=text.hidden_size,
        state_dimensions=text.hidden_size,
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
        inputs=kind_of(spec),
        labels=labels,
        prompts=tuple(spec.prompts),
        default_prompt=spec.default_prompt,
    )
