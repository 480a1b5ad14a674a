"""Encoded inputs: token ids, segments and spans of one sequence, or the pixels of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core.options import ScoreOptions
from service.errors import invalid

if TYPE_CHECKING:
    import torch


TOTAL_TEXTS = 16  # times max_text_bytes: all texts of one request


MAX_TOLD = 20_000  # next tokens that one request may ask for: each is named on the device's thread


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token as the tokenizer named it; `start:end` are its characters, without surrounding spaces."""

    name: str
    start: int
    end: int
    is_special: bool


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """One sequence of the model, special tokens included; an image has patches instead of ids."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] | None = None  # segment of each token, where the row is a pair
    target: tuple[int, ...] | None = None  # of encoder-decoder models
    pixels: torch.Tensor | None = None  # [C, H, W] float32
    patches: int = 0
    pieces: tuple[TokenSpan, ...] | None = None  # of the target, or of ids; kept where tokens are told by name

    def __len__(self) -> int:
        """Tokens that the model computes."""
        return len(self.ids) + len(self.target or ()) + self.patches


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The rows of all inputs in order; input i has `rows_per_input[i]` of them, more than one where it was chunked."""

    rows: tuple[EncodedInput, ...]
    rows_per_input: tuple[int, ...]
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    query: int | None = None  # explain: the token that looks

    @property
    def chunks(self) -> int:
        """Of inputs that did not fit in one."""
        return sum(count for count in self.rows_per_input if count > 1)


def score_positions(options: ScoreOptions, length: int) -> list[int]:
    """Where the next tokens are told, of a row of `length` tokens, without repetition. Raises FarsightError (422)."""
    if options.top_k == 0:
        return []
    found = []
    for position in (-1,) if options.positions is None else options.positions:
        if not -length <= position < length:
            raise invalid(f"positions: {position} is outside the {length} tokens", param="positions")
        found.append(position % length)
    return list(dict.fromkeys(found))
