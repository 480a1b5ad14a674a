"""What one model takes: its tokenizer or image processor, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.models.inputs.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from service.models.inputs.image import ImageProcessor


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Lengths in tokens; a model takes either texts (with a tokenizer) or images."""

    model: str
    max_length: int
    vocab_size: int
    max_text_bytes: int
    tokenizer: TextTokenizer | None = None  # None: the model takes images
    images: ImageProcessor | None = None
    patches: int = 0
    has_types: bool = False
    has_target: bool = False
