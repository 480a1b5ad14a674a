"""What a model that is being loaded accepts as input: by its files, and by its module where only that knows."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

import torch

from service.models import hook
from service.models.files import read_json
from service.models.inputs.spec import InputSpec, Prompt
from service.models.inputs.tokenizer import text_tokenizer
from service.models.loading.probe import probe_context
from service.models.loading.sentence_files import SentenceFiles
from service.models.loading.source import Source

logger = logging.getLogger("farsight")

DEFAULT_MAX_LENGTH = 512  # tokens, if neither the files nor the model's positions have a limit


def image_spec(source: Source, max_text_bytes: int, device: torch.device, base: Any) -> InputSpec:
    from service.models.inputs.image import read_processor

    processor = read_processor(source.directory, source.hf_config)
    pixels = torch.zeros(1, processor.channels, *processor.size)
    # counted, not computed from the patches: models add tokens of their own (registers, a distillation token)
    with torch.inference_mode(), hook.running(probe_context()):
        tokens = base(pixels.to(device, next(base.parameters()).dtype)).last_hidden_state.shape[1]
    name = source.config.name
    return InputSpec(name, tokens, 0, max_text_bytes, image_processor=processor, states=tokens)


def audio_spec(source: Source, max_text_bytes: int) -> InputSpec:
    from service.models.inputs.audio import read_processor

    processor = read_processor(source.directory, source.hf_config)
    name, states = source.config.name, processor.states
    return InputSpec(name, states, 0, max_text_bytes, audio_processor=processor, states=states)


def text_spec(source: Source, max_text_bytes: int, positions: int | None, tokenizer: Any, base: Any) -> InputSpec:
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
        max_text_bytes=max_text_bytes,
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


def kind_of(spec: InputSpec) -> Literal["text", "source and target", "image", "audio"]:
    if spec.tokenizer is None:
        return "image" if spec.audio_processor is None else "audio"
    return "source and target" if spec.has_target else "text"
