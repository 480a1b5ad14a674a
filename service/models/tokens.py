"""Texts, pairs and token ids into rows that a model computes: limits told with numbers, cuts and chunks counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Encoding, Tokenizer

from service.core import ForwardOptions, ForwardRequest, ScoreOptions
from service.errors import FarsightError, Kind, invalid, too_large

if TYPE_CHECKING:
    import torch

    from service.models.images import ImageProcessor


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of the model, special tokens included; an image has patches instead of ids."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] | None = None  # segment of each token, where the row is a pair
    target: tuple[int, ...] | None = None  # of encoder-decoder models
    pixels: torch.Tensor | None = None  # [C, H, W] float32
    patches: int = 0
    encoding: Encoding | None = None  # kept where tokens are told by name

    def __len__(self) -> int:
        """Tokens that the model computes."""
        return len(self.ids) + len(self.target or ()) + self.patches


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The rows of all inputs in order; input i has `rows_per_input[i]` of them, more than one where it was chunked."""

    rows: tuple[Row, ...]
    rows_per_input: tuple[int, ...]
    truncated: int = 0
    dropped_tokens: int = 0

    @property
    def chunks(self) -> int:
        """Of inputs that did not fit in one."""
        return sum(count for count in self.rows_per_input if count > 1)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one model takes. Thread-safe: runs on any thread, never on the device's."""

    model: str
    max_length: int
    vocab_size: int
    max_text_bytes: int
    tokenizer: Tokenizer | None = None  # None: the model takes images
    images: ImageProcessor | None = None
    patches: int = 0
    has_types: bool = False
    has_target: bool = False

    def rows(self, request: ForwardRequest) -> Tokenized:
        """The rows of one request. Raises FarsightError: 422 for what the model does not take, 413 for too much."""
        self._check_kind(request)
        tokenized = self._rows(request)
        if isinstance(request.options, ScoreOptions) and request.options.top_k:
            for row in tokenized.rows:  # here and not on the device, where a batch would run twice
                score_positions(request.options, len(row.target or row.ids))
        return tokenized

    def _rows(self, request: ForwardRequest) -> Tokenized:
        if self.images is not None:
            pixels = [self.images(at, data) for at, data in enumerate(request.images)]
            if request.pixel_values is not None:
                pixels = list(self._checked_pixels(request.pixel_values))
            return Tokenized(tuple(Row(pixels=one, patches=self.patches) for one in pixels), (1,) * len(pixels))
        if request.token_ids:
            return self._from_ids(request.token_ids, request.options)
        pieces = _Pieces(self, request)
        if request.pairs:
            for query, other in request.pairs:
                self._check_size(len(pieces.counts), query, other)
            first = self._encode([query for query, _ in request.pairs])
            second = self._encode([other for _, other in request.pairs])
            for a, b in zip(first, second, strict=True):
                pieces.add_pair(a, b)
        else:
            for index, text in enumerate(request.texts):
                self._check_size(index, text)
            for encoding in self._encode(request.texts):
                pieces.add(encoding)
        return pieces.done()

    def _check_kind(self, request: ForwardRequest) -> None:
        has_images = bool(request.images) or request.pixel_values is not None
        if self.images is not None and not has_images:
            raise invalid(f"model {self.model!r} takes images", param="images")
        if self.images is None and has_images:
            raise invalid(f"model {self.model!r} takes text, not images", param="images")
        if self.has_target and not request.pairs and request.task == "score":
            raise invalid(f"model {self.model!r} scores a target given its source", param="target")
        if request.options.truncate == "chunk" and request.task != "embed":
            raise invalid('truncate "chunk" is for embeddings; use "error" or "end"', param="truncate")

    def _checked_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.images is not None, "bug: a model of text has no pixels"
        expected = (self.images.channels, *self.images.size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not len(pixels):
            raise invalid(f"pixel_values: expected [n, {', '.join(map(str, expected))}], got {list(pixels.shape)}")
        if not pixels.is_floating_point() or not bool(pixels.isfinite().all()):
            raise invalid("pixel_values: expected finite floating-point numbers", param="pixel_values")
        return pixels.float()

    def _check_size(self, index: int, *texts: str) -> None:
        for text in texts:
            size = len(text.encode(errors="surrogatepass"))
            if size > self.max_text_bytes:
                raise too_large(f"input {index}", size, self.max_text_bytes, "bytes", param="input")

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        assert self.tokenizer is not None, "bug: checked by _check_kind"
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _from_ids(self, rows: Sequence[tuple[int, ...]], options: ForwardOptions) -> Tokenized:
        """Token ids that the caller made are used as they are: no special tokens are added."""
        found: list[Row] = []
        counts: list[int] = []
        truncated, dropped = 0, 0
        for index, row in enumerate(rows):
            if not row:
                raise invalid(f"input {index} has no tokens", param="input")
            low, high = min(row), max(row)
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise invalid(f"input {index}: token id {bad} is outside 0..{self.vocab_size - 1}", param="input")
            over = len(row) - self.max_length
            parts = [row]
            if over > 0 and options.truncate == "chunk":
                step = self._step(self.max_length, options)
                parts = [row[at : at + self.max_length] for at in range(0, len(row) - options.chunk_overlap, step)]
            elif over > 0:
                self.refuse_or_allow(index, len(row), options)
                truncated, dropped = truncated + 1, dropped + over
                parts = [row[: self.max_length]]
            found += [Row(part) for part in parts]
            counts.append(len(parts))
        return Tokenized(tuple(found), tuple(counts), truncated, dropped)

    def refuse_or_allow(self, index: int, length: int, options: ForwardOptions) -> None:
        """413 with both lengths, unless the caller allows the cut."""
        if options.truncate == "error":
            raise FarsightError(
                Kind.TOO_LARGE,
                f"input {index} has {length} tokens, over the {self.max_length} of model {self.model!r}; "
                'shorten it, or set "truncate": "end"',
                code="context_length_exceeded",
                param="input",
            )

    def _step(self, room: int, options: ForwardOptions) -> int:
        if options.chunk_overlap * 2 > room:
            raise invalid(
                f"chunk_overlap {options.chunk_overlap} is over half of a chunk's {room} tokens", param="chunk_overlap"
            )
        return room - options.chunk_overlap


class _Pieces:
    """Collects the rows of one request's texts."""

    def __init__(self, inputs: Inputs, request: ForwardRequest) -> None:
        assert inputs.tokenizer is not None, "bug: a model of images has no texts"
        self._inputs, self._tokenizer, self._options = inputs, inputs.tokenizer, request.options
        self._keeps = request.task in ("explain", "score")
        self._room = inputs.max_length - self._tokenizer.num_special_tokens_to_add(False)
        self._rows: list[Row] = []
        self.counts: list[int] = []
        self._truncated = self._dropped = 0

    def add(self, encoding: Encoding) -> None:
        index, over = len(self.counts), len(encoding) - self._room
        parts = [encoding]
        if over > 0 and self._options.truncate == "chunk":
            stride = self._room - self._inputs._step(self._room, self._options)
            encoding.truncate(self._room, stride=stride)
            parts += encoding.overflowing
        elif over > 0:
            self._cut(index, encoding, over)
        self._rows += [self._row(index, self._tokenizer.post_process(part)) for part in parts]
        self.counts.append(len(parts))

    def add_pair(self, first: Encoding, second: Encoding) -> None:
        """A query with its document, of which the document is cut; or a source with its target, both cut alike."""
        index = len(self.counts)
        if self._inputs.has_target:
            for encoding in (first, second):
                if (over := len(encoding) - self._room) > 0:
                    self._cut(index, encoding, over)
            source = self._row(index, self._tokenizer.post_process(first))
            target = self._tokenizer.post_process(second)
            if not target.ids:
                raise invalid(f"input {index}: the target has no tokens", param="target")
            self._rows.append(Row(source.ids, target=tuple(target.ids), encoding=target))
        else:
            special = self._tokenizer.num_special_tokens_to_add(True)
            over = len(first) + len(second) + special - self._inputs.max_length
            if over > 0:
                if over >= len(second) and self._options.truncate != "error":
                    raise invalid(
                        f"input {index}: the query alone has {len(first)} of the {self._inputs.max_length} tokens",
                        param="query",
                    )
                self._cut(index, second, over)
            self._rows.append(self._row(index, self._tokenizer.post_process(first, second)))
        self.counts.append(1)

    def _cut(self, index: int, encoding: Encoding, over: int) -> None:
        self._inputs.refuse_or_allow(index, self._inputs.max_length + over, self._options)
        encoding.truncate(len(encoding) - over)
        self._truncated += 1
        self._dropped += over

    def _row(self, index: int, encoding: Encoding) -> Row:
        if not encoding.ids:
            raise invalid(f"input {index} has no tokens", param="input")
        types = tuple(encoding.type_ids) if self._inputs.has_types else None
        if types is not None and not any(types):
            types = None  # as the model assumes without them
        return Row(tuple(encoding.ids), types, encoding=encoding if self._keeps else None)

    def done(self) -> Tokenized:
        return Tokenized(tuple(self._rows), tuple(self.counts), self._truncated, self._dropped)


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


def read_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json without its own truncation and padding: both would hide what was cut."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
