"""Texts, pairs and token ids into rows that a model computes: limits told with numbers, cuts and chunks counted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Encoding

from service.core.options import EmbedOptions, ForwardOptions
from service.core.request import ForwardRequest
from service.errors import FarsightError, Kind, invalid
from service.models.inputs.rows import EncodedInput, Tokenized, TokenSpan
from service.models.inputs.spec import InputSpec


class EncodedInputBuilder:
    """Collects the rows of one request."""

    def __init__(self, inputs: InputSpec, request: ForwardRequest) -> None:
        assert inputs.tokenizer is not None, "bug: a model of images has no texts"
        self._inputs, self._tokenizer = inputs, inputs.tokenizer
        self._request, self._options = request, request.options
        self._keeps = request.task in ("explain", "score")
        self._rows: list[EncodedInput] = []
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
        pieces: tuple[TokenSpan, ...] | None = None,
    ) -> EncodedInput:
        index = len(self._counts)
        if not ids:
            raise invalid(f"input {index} has no tokens", param="input")
        for some in (ids, target or ids):  # a tokenizer may know more tokens than its model
            low, high = min(some), max(some)
            if low < 0 or high >= self._inputs.vocab_size:
                bad = low if low < 0 else high
                limit = self._inputs.vocab_size - 1
                raise invalid(f"input {index}: token id {bad} is outside 0..{limit}", param="input")
        return EncodedInput(ids, types, target, pieces=pieces)

    def _add(self, rows: list[EncodedInput]) -> None:
        self._rows += rows
        self._counts.append(len(rows))

    def done(self) -> Tokenized:
        query: int | None = None
        if self._request.task == "explain":
            query = find(self._rows[0], self._request.query, self._request.texts[0] if self._request.texts else None)
        counts = tuple(self._counts)
        return Tokenized(tuple(self._rows), counts, len(self._cut_inputs), self._dropped, query)


def refuse_or_allow(inputs: InputSpec, index: int, length: int, options: ForwardOptions) -> None:
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


def find(row: EncodedInput, query: int | str | None, text: str | None) -> int:
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
