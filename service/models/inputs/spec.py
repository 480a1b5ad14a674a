"""What one model accepts as input: text, images or audio, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.models.inputs.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from service.models.inputs.audio import AudioProcessor
    from service.models.inputs.image import ImageProcessor


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that goes before every text of a request."""

    text: str
    tokens: int  # at the beginning of a row, special ones included


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The inputs of one model. It has a tokenizer, or a processor of images or of audio."""

    model: str  # its name, for error messages
    max_length: int  # tokens of one row
    vocab_size: int
    max_text_bytes: int  # bytes of one text
    tokenizer: TextTokenizer | None = None
    image_processor: ImageProcessor | None = None
    audio_processor: AudioProcessor | None = None
    states: int = 0  # of one image or window of audio, the model's own tokens included
    prompts: Mapping[str, Prompt] = field(default_factory=dict)  # of embeddings, by name
    default_prompt: str | None = None  # name of the one that is applied if a request names none
    has_types: bool = False  # the model distinguishes the two texts of a pair by token types, zero if left out
    cuts_left: bool = False  # the tokenizer keeps the end of a text that is cut, not its beginning
    type_count: int = 1  # token types that callers may give are below this
    always_types: bool = False  # types count even if all are zero, as where they are looked up as tokens (GPT-2)
    has_target: bool = False  # the model scores a target given its source
