"""What a model computes: token ids of one sequence, one image or one window of audio, and all for one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core.options import ScoreOptions
from service.errors import invalid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token: its name in the vocabulary, and its characters `start:end` without surrounding spaces."""

    name: str
    start: int
    end: int
    is_special: bool


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """One sequence, special tokens included, or one image or window of audio, which has features instead of ids."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] | None = None  # token type (segment) of each id, if the input is a pair
    target: tuple[int, ...] | None = None  # target ids, encoder-decoder models only
    features: torch.Tensor | None = None  # pixels [C, H, W] or a spectrogram [mel bands, frames], float32
    states: int = 0  # that a model makes of `features`, its own tokens (such as a class token) included
    kept: int | None = None  # leading states that belong to the result; None: all
    prompt: int = 0  # leading tokens that are the model's prompt, special ones included
    spans: tuple[TokenSpan, ...] | None = None  # for `target`, else for `ids`; only for tasks that report tokens

    def __len__(self) -> int:
        """Tokens that the model computes."""
        return len(self.ids) + len(self.target or ()) + self.states

    @property
    def length(self) -> int:
        """States in the result."""
        return len(self.ids) + self.states if self.kept is None else self.kept


@dataclass(frozen=True, slots=True)
class Tokenized:
    """All rows of one request, in order. Input i has `rows_per_input[i]` rows: more than one if it was chunked."""

    rows: tuple[EncodedInput, ...]
    rows_per_input: tuple[int, ...]
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    query: int | None = None  # explain: index of the query token

    @property
    def chunks(self) -> int:
        """Number of chunks, over all inputs that were chunked."""
        return sum(count for count in self.rows_per_input if count > 1)


def score_positions(options: ScoreOptions, length: int) -> list[int]:
    """Positions of a row of `length` tokens at which the next tokens are reported: distinct, in the caller's order.

    Raises FarsightError (422) if a position is outside the row.
    """
    if options.top_k == 0:
        return []
    positions = []
    for position in (-1,) if options.positions is None else options.positions:
        if not -length <= position < length:
            raise invalid(f"positions: {position} is outside the {length} tokens", param="positions")
        positions.append(position % length)
    return list(dict.fromkeys(positions))
