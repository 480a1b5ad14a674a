"""Loads a model from a local Hugging Face directory: safetensors only, no remote code, no downloads.

A loaded model is verified (`verify.py`): a few tokens run through Transformers' eager attention and through ours. A
model whose results differ is refused; one whose packed results differ runs in batches of equal length. Then it is
measured (`measure.py`).
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as TEXT_ENCODERS
from transformers.utils.logging import disable_progress_bar

from service.config import ModelConfig
from service.core.model_info import MatrixSizes, ModelInfo
from service.core.options import ModelTask
from service.models import hook
from service.models.files import directory_of, read_json, takes_audio, takes_images, task_of
from service.models.heads import packed_classifier
from service.models.inputs.processor import InputProcessor
from service.models.inputs.spec import InputSpec, Prompt
from service.models.inputs.tokenizer import load_tokenizer, text_tokenizer
from service.models.loading.labels import count_labels, read_labels
from service.models.loading.measure import counted, warmed
from service.models.loading.probe import probe_context
from service.models.loading.rope import may_pack, rope_resets, scale_rope, scaled_length
from service.models.loading.sentence_files import SentenceFiles, read_sentence_files
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
DEFAULT_MAX_LENGTH = 512  # tokens, if neither the files nor the model's positions have a limit


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The service's settings that models depend on."""

    device: torch.device
    max_text_bytes: int
    max_batch_tokens: int
    max_audio_windows: int = 1  # of one request


def load(config: ModelConfig, settings: LoadSettings) -> Model:
    """A verified and measured model on the device.

    Raises FileNotFoundError for missing files, ValueError for files or settings that do not fit together, RuntimeError
    for a model whose results differ from Transformers'; other errors of Transformers for damaged files.
    """
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    source = _read_source(config)
    takes_text = not source.takes_images and not source.takes_audio
    tokenizer = load_tokenizer(source.directory, lower_case=source.files.lower_case) if takes_text else None
    module: Any = _read_module(source).to(settings.device).eval()
    install_checkpoints(module)
    base = module.get_encoder() if source.hf_config.is_encoder_decoder else module.base_model
    positions, padding_id = _positions(source, base)
    if source.takes_images:
        spec = _image_spec(source, settings, base)
    elif source.takes_audio:
        spec = _audio_spec(source, settings)
    else:
        spec = _text_spec(source, settings, positions, tokenizer, base)
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
    return warmed(counted(verified(model, tokenizer)))


# -- from files to a module -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What the service's configuration and the model's files say, before the weights are read."""

    config: ModelConfig
    directory: Path
    hf_config: PretrainedConfig
    task: ModelTask
    files: SentenceFiles

    @property
    def takes_images(self) -> bool:
        return takes_images(self.hf_config.to_dict())

    @property
    def takes_audio(self) -> bool:
        return takes_audio(self.hf_config.to_dict())


def _read_source(config: ModelConfig) -> _Source:
    directory = directory_of(config)
    hf_config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.rope_scaling is not None:
        scale_rope(config.name, hf_config, config.rope_scaling)
    task = config.task or task_of(directory)
    count = count_labels(directory) if task in ("classify", "rerank") else None
    if count is not None and count != hf_config.num_labels:  # as many as the head has, whatever the names say
        hf_config.num_labels = count
    return _Source(config, directory, hf_config, task, read_sentence_files(directory, task))


def _read_module(source: _Source) -> nn.Module:
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


def _auto_class(source: _Source) -> Any:
    match source.task:
        case "embed":
            # such as T5's encoder, whose directory may hold no decoder
            _check_pooled_encoder(source)
            return AutoModelForTextEncoding if source.hf_config.model_type in TEXT_ENCODERS else AutoModel
        case "classify" | "rerank":
            return AutoModelForImageClassification if source.takes_images else AutoModelForSequenceClassification
        case "score":
            return AutoModelForSeq2SeqLM if source.hf_config.is_encoder_decoder else AutoModelForCausalLM


def _check_pooled_encoder(source: _Source) -> None:
    """Raises ValueError for an encoder-decoder model whose decoder sentence-transformers would pool."""
    kind, has_modules = source.hf_config.model_type, (source.directory / "modules.json").is_file()
    if has_modules and source.hf_config.is_encoder_decoder and kind not in (*TEXT_ENCODERS, *POOLED_ENCODERS):
        raise ValueError(f"sentence-transformers pools the decoder of {kind} models, which is not supported")


# -- from files to what a model says of itself ------------------------------------------------------------------


def _positions(source: _Source, base: nn.Module) -> tuple[int | None, int | None]:
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


def _image_spec(source: _Source, settings: LoadSettings, base: Any) -> InputSpec:
    from service.models.inputs.image import read_processor

    processor = read_processor(source.directory, source.hf_config)
    pixels = torch.zeros(1, processor.channels, *processor.size)
    # counted, not computed from the patches: models add tokens of their own (registers, a distillation token)
    with torch.inference_mode(), hook.running(probe_context()):
        tokens = base(pixels.to(settings.device, next(base.parameters()).dtype)).last_hidden_state.shape[1]
    name = source.config.name
    return InputSpec(name, tokens, 0, settings.max_text_bytes, image_processor=processor, states=tokens)


def _audio_spec(source: _Source, settings: LoadSettings) -> InputSpec:
    from service.models.inputs.audio import read_processor

    processor = read_processor(source.directory, source.hf_config)
    name, states = source.config.name, processor.states
    return InputSpec(name, states, 0, settings.max_text_bytes, audio_processor=processor, states=states)


def _text_spec(source: _Source, settings: LoadSettings, positions: int | None, tokenizer: Any, base: Any) -> InputSpec:
    config, hf_config = source.config, source.hf_config
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(f"model {config.name!r}: max_length {config.max_length} is over its {positions} positions")
    text = text_tokenizer(tokenizer)
    # a tokenizer that does not give them leaves them at zero
    is_read = "token_type_ids" in inspect.signature(base.forward).parameters
    gives_types = is_read and "token_type_ids" in tokenizer.model_input_names
    added = {part[0] for part in text.single.parts if part is not None}
    asks_eos = read_json(source.directory / "tokenizer_config.json").get("add_eos_token")
    if asks_eos and tokenizer.eos_token_id not in added:
        logger.warning(
            "model %s: tokenizer_config.json has add_eos_token, tokenizer.json does not add one; Transformers follows "
            "the latter, and so does this service: the model may have been trained otherwise", config.name,
        )  # fmt: skip

    def prompt(before: str) -> Prompt:
        if not before:
            return Prompt("", 0)
        row, _ = text.single.filled(text.plain.encode(before, add_special_tokens=False).ids)
        return Prompt(before, len(row) - (bool(row) and row[-1] in tokenizer.all_special_ids))

    return InputSpec(
        model=config.name,
        max_length=config.max_length or _declared_length(source.files, tokenizer, positions),
        vocab_size=hf_config.get_text_config().vocab_size,
        max_text_bytes=settings.max_text_bytes,
        tokenizer=text,
        prompts={name: prompt(before) for name, before in source.files.prompts.items()},
        default_prompt=source.files.default_prompt,
        cuts_left=tokenizer.truncation_side == "left",
        has_types=gives_types and getattr(hf_config, "type_vocab_size", 2) > 1,
        type_count=getattr(hf_config, "type_vocab_size", hf_config.get_text_config().vocab_size) if is_read else 1,
        always_types=gives_types and not hasattr(hf_config, "type_vocab_size"),
        has_target=bool(hf_config.is_encoder_decoder) and source.task == "score",
    )


def _declared_length(files: SentenceFiles, tokenizer: Any, positions: int | None) -> int:
    """Tokens that sentence-transformers' files declare, else the tokenizer's, at most the model's positions."""
    declared = [files.max_length or tokenizer.model_max_length, positions]
    lengths = [int(length) for length in declared if isinstance(length, int | float) and 0 < length < 1e9]
    return min(lengths) if lengths else DEFAULT_MAX_LENGTH


def _pooling(source: _Source) -> embed.Pooling:
    """As the files say; `pooling` of the service's configuration replaces the modes alone."""
    pooling = source.files.pooling
    if source.config.pooling is not None:
        modes: dict[str, embed.PoolMode] = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
        return replace(pooling, modes=(modes[source.config.pooling],))
    return replace(pooling, modes=("cls",)) if source.takes_images else pooling


def _info(source: _Source, module: Any, base: nn.Module, spec: InputSpec) -> ModelInfo:
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
        inputs=_inputs(spec),
        labels=labels,
        prompts=tuple(spec.prompts),
        default_prompt=spec.default_prompt,
    )


def _inputs(spec: InputSpec) -> Literal["text", "source and target", "image", "audio"]:
    if spec.tokenizer is None:
        return "image" if spec.audio_processor is None else "audio"
    return "source and target" if spec.has_target else "text"
