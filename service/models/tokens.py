"""Texts, pairs and token ids into rows that a model computes: limits told with numbers, cuts and chunks counted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Encoding, Tokenizer

from service.core import EmbedOptions, ForwardOptions, ForwardRequest, ScoreOptions
from service.errors import FarsightError, Kind, invalid, too_large

if TYPE_CHECKING:
    import torch

    from service.models.images import ImageProcessor

ENCODE_BYTES = 4 * 1024**2  # of the texts that are encoded together: an encoding takes ~500 bytes a token
TOTAL_TEXTS = 16  # times max_text_bytes: all texts of one request
MAX_TOLD = 20_000  # next tokens that one request may ask for: each is named on the device's thread


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as the tokenizer named it; `start:end` are its characters, without surrounding spaces."""

    name: str
    start: int
    end: int
    is_special: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of the model, special tokens included; an image has patches instead of ids."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] | None = None  # segment of each token, where the row is a pair
    target: tuple[int, ...] | None = None  # of encoder-decoder models
    pixels: torch.Tensor | None = None  # [C, H, W] float32
    patches: int = 0
    pieces: tuple[Piece, ...] | None = None  # of the target, or of ids; kept where tokens are told by name

    def __len__(self) -> int:
        """Tokens that the model computes."""
        return len(self.ids) + len(self.target or ()) + self.patches


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The rows of all inputs in order; input i has `rows_per_input[i]` of them, more than one where it was chunked."""

    rows: tuple[Row, ...]
    rows_per_input: tuple[int, ...]
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    query: int | None = None  # explain: the token that looks

    @property
    def chunks(self) -> int:
        """Of inputs that did not fit in one."""
        return sum(count for count in self.rows_per_input if count > 1)


@dataclass(frozen=True, slots=True)
class Template:
    """Where a tokenizer puts special tokens: (id, type) each, or None for the next of the sequences."""

    parts: tuple[tuple[int, int] | None, ...]
    types: tuple[int, ...]  # of each sequence

    @property
    def special(self) -> int:
        return sum(part is not None for part in self.parts)

    def filled(self, *sequences: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, types) of one row."""
        ids: list[int] = []
        types: list[int] = []
        given = iter(zip(sequences, self.types, strict=True))
        for part in self.parts:
            if part is not None:
                ids.append(part[0])
                types.append(part[1])
            else:
                sequence, kind = next(given)
                ids += sequence
                types += [kind] * len(sequence)
        return tuple(ids), tuple(types)


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer without its post-processor, and where that one would put special tokens. Its own truncation keeps
    all that it cuts, and its offsets are wrong where it runs twice."""

    plain: Tokenizer
    single: Template
    pair: Template

    def encode(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Without special tokens; a few texts at a time."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and size + len(text) > ENCODE_BYTES:
                yield from self.plain.encode_batch(batch, add_special_tokens=False)
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        yield from self.plain.encode_batch(batch, add_special_tokens=False)

    def pieces(self, encoding: Encoding, text: str, count: int) -> tuple[Piece, ...]:
        """The tokens of one sequence that was cut to `count`, special ones included."""
        own = zip(encoding.tokens[:count], encoding.offsets[:count], strict=True)
        found: list[Piece] = []
        for part in self.single.parts:
            if part is not None:
                found.append(Piece(self.plain.id_to_token(part[0]) or "", 0, 0, is_special=True))
                continue
            for name, (start, end) in own:
                piece = text[start:end]
                spaces = len(piece) - len(piece.lstrip()) if piece.strip() else 0
                found.append(Piece(name, start + spaces, start + len(piece.rstrip()) if spaces else end, False))
        return tuple(found)

    def name(self, token: int) -> str:
        """As a person reads it."""
        return self.plain.decode([token], skip_special_tokens=False)


def read_tokenizer(directory: Path) -> TextTokenizer:
    """tokenizer.json without its own truncation and padding: both would hide what was cut."""
    whole = Tokenizer.from_file(str(directory / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    plain = Tokenizer.from_str(whole.to_str())
    plain.post_processor = None
    sample = plain.encode("a", add_special_tokens=False)
    return TextTokenizer(
        plain, _template(whole.post_process(sample)), _template(whole.post_process(sample, plain.encode("b")))
    )


def _template(processed: Encoding) -> Template:
    parts: list[tuple[int, int] | None] = []
    types: dict[int, int] = {}
    for sequence, token, kind in zip(processed.sequence_ids, processed.ids, processed.type_ids, strict=True):
        if sequence is None:
            parts.append((token, kind))
        elif sequence not in types:
            parts.append(None)
            types[sequence] = kind
    return Template(tuple(parts), tuple(types[at] for at in sorted(types)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one model takes. Thread-safe: runs on any thread, never on the device's."""

    model: str
    max_length: int
    vocab_size: int
    max_text_bytes: int
    tokenizer: TextTokenizer | None = None  # None: the model takes images
    images: ImageProcessor | None = None
    patches: int = 0
    has_types: bool = False
    has_target: bool = False

    def rows(self, request: ForwardRequest) -> Tokenized:
        """The rows of one request. Raises FarsightError: 422 for what the model does not take, 413 for too much."""
        self._check_kind(request)
        tokenized = self._rows(request)
        if isinstance(request.options, ScoreOptions) and request.options.top_k:
            told = sum(len(score_positions(request.options, len(row.target or row.ids))) for row in tokenized.rows)
            if told * request.options.top_k > MAX_TOLD:
                raise too_large("top_k", told * request.options.top_k, MAX_TOLD, "next tokens", param="top_k")
        return tokenized

    def _rows(self, request: ForwardRequest) -> Tokenized:
        if self.images is not None:
            pixels = [self.images(at, data) for at, data in enumerate(request.images)]
            if request.pixel_values is not None:
                pixels = list(self._checked_pixels(request.pixel_values))
            return Tokenized(tuple(Row(pixels=one, patches=self.patches) for one in pixels), (1,) * len(pixels))
        collected = _Rows(self, request)
        if request.token_ids:
            for row in request.token_ids:
                collected.add_ids(row)
        elif request.pairs:
            self._check_sizes([text for pair in request.pairs for text in pair])
            collected.add_pairs(request.pairs)
        else:
            self._check_sizes(request.texts)
            collected.add_texts(request.texts)
        return collected.done()

    def _check_kind(self, request: ForwardRequest) -> None:
        has_images = bool(request.images) or request.pixel_values is not None
        if self.images is not None and not has_images:
            raise invalid(f"model {self.model!r} takes images", param="images")
        if self.images is None and has_images:
            raise invalid(f"model {self.model!r} takes text, not images", param="images")
        if request.task == "score" and self.has_target != bool(request.pairs):
            kind = "a target given its source" if self.has_target else "an input, without source and target"
            raise invalid(f"model {self.model!r} scores {kind}", param="target")
        if request.task == "rerank" and request.token_ids and self.has_types:
            raise invalid(f"model {self.model!r} tells query and document apart: give their texts", param="input_ids")
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

    def _check_sizes(self, texts: Sequence[str]) -> None:
        """Before anything is tokenised. A text that occurs more than once counts once."""
        total = 0
        for index, text in enumerate(dict.fromkeys(texts)):
            size = len(text.encode(errors="surrogatepass"))
            total += size
            if size > self.max_text_bytes:
                raise too_large(f"input {index}", size, self.max_text_bytes, "bytes", param="input")
        if total > TOTAL_TEXTS * self.max_text_bytes:
            raise too_large("all texts together", total, TOTAL_TEXTS * self.max_text_bytes, "bytes", param="input")


class _Rows:
    """Collects the rows of one request."""

    def __init__(self, inputs: Inputs, request: ForwardRequest) -> None:
        assert inputs.tokenizer is not None, "bug: a model of images has no texts"
        self._inputs, self._tokenizer = inputs, inputs.tokenizer
        self._request, self._options = request, request.options
        self._keeps = request.task in ("explain", "score")
        self._rows: list[Row] = []
        self._counts: list[int] = []
        self._cut_inputs: set[int] = set()
        self._dropped = 0

    def add_ids(self, row: tuple[int, ...]) -> None:
        """Token ids that the caller made are used as they are: no special tokens are added."""
        self._add([self._row(part) for part in self._parts(row, self._inputs.max_length)])

    def add_texts(self, texts: Sequence[str]) -> None:
        template = self._tokenizer.single
        room = self._inputs.max_length - template.special
        for text, encoding in zip(texts, self._tokenizer.encode(texts), strict=True):
            parts = self._parts(tuple(encoding.ids), room, extra=template.special)
            pieces = self._tokenizer.pieces(encoding, text, len(parts[0])) if self._keeps else None
            self._add([self._row(template.filled(part)[0], pieces=pieces) for part in parts])

    def add_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """A query with its document, of which the document is cut; or a source with its target, both cut alike."""
        queries = dict.fromkeys(query for query, _ in pairs)
        ids = {query: one.ids for query, one in zip(queries, self._tokenizer.encode(list(queries)), strict=True)}
        others = self._tokenizer.encode([other for _, other in pairs])
        add = self._add_target if self._inputs.has_target else self._add_pair
        for (query, text), encoding in zip(pairs, others, strict=True):
            add(ids[query], text, encoding)

    def _add_target(self, source: list[int], text: str, encoding: Encoding) -> None:
        template = self._tokenizer.single
        room = self._inputs.max_length - template.special
        (first,) = self._parts(tuple(source), room, extra=template.special)
        (second,) = self._parts(tuple(encoding.ids), room, extra=template.special)
        target, _ = template.filled(second)
        if not target:
            raise invalid(f"input {len(self._counts)}: the target has no tokens", param="target")
        pieces = self._tokenizer.pieces(encoding, text, len(second)) if self._keeps else None
        self._add([self._row(template.filled(first)[0], target=target, pieces=pieces)])

    def _add_pair(self, query: list[int], _: str, encoding: Encoding) -> None:
        template = self._tokenizer.pair
        room = self._inputs.max_length - template.special - len(query)
        if room < 1 and self._options.truncate != "error":
            raise invalid(
                f"input {len(self._counts)}: the query alone has {len(query)} of the {self._inputs.max_length} tokens",
                param="query",
            )
        (document,) = self._parts(tuple(encoding.ids), room, extra=template.special + len(query))
        ids, types = template.filled(query, document)
        self._add([self._row(ids, types=types if self._inputs.has_types and any(types) else None)])

    def _parts(self, ids: tuple[int, ...], room: int, extra: int = 0) -> list[tuple[int, ...]]:
        """What fits: all of it, its beginning, or overlapping chunks. `extra`: tokens that are added to each."""
        over = len(ids) - room
        if over <= 0:
            return [ids]
        if self._options.truncate == "chunk":
            overlap = self._options.chunk_overlap
            if overlap * 2 > room:
                raise invalid(f"chunk_overlap {overlap} is over half of a chunk's {room} tokens", param="chunk_overlap")
            return [ids[at : at + room] for at in range(0, len(ids) - overlap, room - overlap)]
        index = len(self._counts)
        refuse_or_allow(self._inputs, index, len(ids) + extra, self._options)
        self._cut_inputs.add(index)
        self._dropped += over
        return [ids[:room]]

    def _row(
        self,
        ids: tuple[int, ...],
        types: tuple[int, ...] | None = None,
        target: tuple[int, ...] | None = None,
        pieces: tuple[Piece, ...] | None = None,
    ) -> Row:
        index = len(self._counts)
        if not ids:
            raise invalid(f"input {index} has no tokens", param="input")
        for some in (ids, target or ids):  # a tokenizer may know more tokens than its model
            low, high = min(some), max(some)
            if low < 0 or high >= self._inputs.vocab_size:
                bad = low if low < 0 else high
                limit = self._inputs.vocab_size - 1
                raise invalid(f"input {index}: token id {bad} is outside 0..{limit}", param="input")
        return Row(ids, types, target, pieces=pieces)

    def _add(self, rows: list[Row]) -> None:
        self._rows += rows
        self._counts.append(len(rows))

    def done(self) -> Tokenized:
        query: int | None = None
        if self._request.task == "explain":
            query = find(self._rows[0], self._request.query, self._request.texts[0] if self._request.texts else None)
        counts = tuple(self._counts)
        return Tokenized(tuple(self._rows), counts, len(self._cut_inputs), self._dropped, query)


def refuse_or_allow(inputs: Inputs, index: int, length: int, options: ForwardOptions) -> None:
    """413 with both lengths, unless the caller allows the cut."""
    if options.truncate == "error":
        or_chunk = ' or "chunk"' if isinstance(options, EmbedOptions) else ""
        raise FarsightError(
            Kind.TOO_LARGE,
            f"input {index} has {length} tokens, over the {inputs.max_length} of model {inputs.model!r}; "
            f'shorten it, or set "truncate": "end"{or_chunk}',
            code="context_length_exceeded",
            param="input",
        )


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


def find(row: Row, query: int | str | None, text: str | None) -> int:
    """The token that is meant: an index (negative from the end), or the token where a part of the text begins. A part
    that is a word of its own is preferred over one inside a word."""
    if isinstance(query, str):
        word = re.search(rf"(?<!\w){re.escape(query)}(?!\w)", text or "") if query else None
        start = word.start() if word else (text or "").find(query) if query else -1
        if start < 0:
            raise invalid(f"query: {query[:64]!r} is not in the text", param="query")
        for index, piece in enumerate(row.pieces or ()):
            if not piece.is_special and piece.start <= start < piece.end:
                return index
        raise invalid(f"query: {query[:64]!r} is in the text, but no token is there (cut off?)", param="query")
    if query is None:
        raise invalid("query: expected a token's index or a part of the text", param="query")
    if not -len(row.ids) <= query < len(row.ids):
        raise invalid(f"query: token {query} is outside the {len(row.ids)} tokens", param="query")
    return query % len(row.ids)
