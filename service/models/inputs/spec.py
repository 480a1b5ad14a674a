"""What one model accepts as input: text or images, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.models.inputs.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from service.models.inputs.image import ImageProcessor


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The inputs of one model. It has a tokenizer (text models) or an image processor, never both."""

    model: str  # its name, for error messages
    max_length: int  # tokens of one row
    vocab_size: int
    max_text_bytes: int  # bytes of one text
    tokenizer: TextTokenizer | None = None
    image_processor: ImageProcessor | None = None
    patches: int = 0  # tokens of one image
    has_types: bool = False  # the model distinguishes the two texts of a pair by token types
    has_target: bool = False  # the model scores a target given its source
