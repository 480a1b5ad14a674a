"""Texts, pairs and token ids into rows: special tokens are added; what is too long is refused, cut or chunked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

from tokenizers import Encoding

from service.attention.output import Checkpoint, no_checkpoint
from service.core.options import EmbedOptions
from service.core.request import ForwardRequest
from service.errors import FarsightError, Kind, invalid, too_large
from service.models.inputs.rows import EncodedInput, Tokenized, TokenSpan
from service.models.inputs.spec import InputSpec, Prompt

Token = TypeVar("Token", int, tuple[int, int])  # an id, or an id with its type

# names of prompts for each kind of input, the first that a model has
INPUT_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
MAX_TOTAL_TEXTS = 16  # all texts of one request together: this many times the bytes that one text may have


def encode_texts(spec: InputSpec, request: ForwardRequest, checkpoint: Checkpoint = no_checkpoint) -> Tokenized:
    """The rows of a request with texts, pairs of texts, or token ids. A text that occurs twice is encoded once.

    Raises FarsightError: 422 for an empty input, an unknown token id, or a query that names no token; 413 for a text
    with too many bytes, or an input over the model's length unless `truncate` allows a cut.
    """
    builder = _EncodedInputBuilder(spec, request, checkpoint)
    if request.token_ids:
        for ids, types in zip_longest(request.token_ids, request.token_types):
            builder.add_ids(ids, types)
    elif request.pairs:
        _check_sizes([text for pair in request.pairs for text in pair], spec.max_text_bytes)
        builder.add_pairs(request.pairs)
    else:
        _check_sizes(request.texts, spec.max_text_bytes)
        builder.add_texts(request.texts)
    return builder.build()


def prompt_of(spec: InputSpec, request: ForwardRequest) -> Prompt | None:
    """The prompt of a request for embeddings: by its name, by the kind of its input, or the model's default.

    Raises FarsightError (422) that names the prompts there are.
    """
    options = request.options
    if not isinstance(options, EmbedOptions):
        return None
    if options.prompt_name is not None:
        if options.prompt_name not in spec.prompts:
            known = ", ".join(spec.prompts) or "no prompts"
            message = f"prompt_name: model {spec.model!r} has {known}, got {options.prompt_name[:64]!r}"
            raise invalid(message, param="prompt_name")
        return spec.prompts[options.prompt_name]
    if options.input_type is not None:  # a model without such a prompt gets none, not its default one
        names = [name for name in INPUT_PROMPTS[options.input_type] if name in spec.prompts]
        return spec.prompts[names[0]] if names else None
    return None if spec.default_prompt is None else spec.prompts[spec.default_prompt]


def _check_sizes(texts: Sequence[str], max_bytes: int) -> None:
    """Refuse texts by their bytes, before anything is tokenized. A text that occurs more than once counts once."""
    total = 0
    for index, text in enumerate(dict.fromkeys(texts)):
        size = len(text.encode(errors="surrogatepass"))
        total += size
        if size > max_bytes:
            raise too_large(f"input {index}", size, max_bytes, "bytes", param="input")
    if total > MAX_TOTAL_TEXTS * max_bytes:
        raise too_large("all texts together", total, MAX_TOTAL_TEXTS * max_bytes, "bytes", param="input")


class _EncodedInputBuilder:
    """Collects the rows of one request, input by input."""

    def __init__(self, spec: InputSpec, request: ForwardRequest, checkpoint: Checkpoint) -> None:
        assert spec.tokenizer is not None, "bug: an image model has no tokenizer"
        self._checkpoint = checkpoint
        self._spec, self._tokenizer = spec, spec.tokenizer
        self._request, self._options = request, request.options
        self._keeps_spans = request.task in ("explain", "score")
        self._rows: list[EncodedInput] = []
        self._rows_per_input: list[int] = []
        self._cut_inputs: set[int] = set()
        self._dropped_tokens = 0

    @property
    def _index(self) -> int:
        """Index of the input that is being added."""
        return len(self._rows_per_input)

    def add_ids(self, ids: tuple[int, ...], types: tuple[int, ...] | None = None) -> None:
        """Add token ids as they are, with their types: no special tokens are added."""
        if types is None:
            self._add([self._row(part) for part in self._fit(ids, self._spec.max_length)])
            return
        if min(types) < 0 or max(types) >= self._spec.type_count:
            limit = self._spec.type_count - 1
            message = f"input {self._index}: expected token types 0..{limit}, got {min(types)}..{max(types)}"
            raise invalid(message, param="token_type_ids")
        parts = self._fit(tuple(zip(ids, types, strict=True)), self._spec.max_length)
        rows = []
        for part in parts:
            part_ids, part_types = zip(*part, strict=True)
            rows.append(self._row(part_ids, types=part_types if any(part_types) else None))
        self._add(rows)

    def add_texts(self, texts: Sequence[str]) -> None:
        template, prompt = self._tokenizer.single, prompt_of(self._spec, self._request)
        room = self._spec.max_length - template.special
        if prompt is not None:
            if prompt.tokens + template.special >= self._spec.max_length:
                message = f"the prompt alone has {prompt.tokens} of the {self._spec.max_length} tokens"
                raise invalid(message, param="prompt_name")
            texts = [prompt.text + text for text in texts]
        encodings = self._encoded(texts)
        known: dict[str, tuple[list[EncodedInput], int]] = {}  # rows, and tokens that were cut
        for text in texts:
            if text in known:
                rows, dropped = known[text]
                self._cut(dropped)
            else:
                encoding, before = next(encodings), self._dropped_tokens
                parts = self._fit(tuple(encoding.ids), room, added=template.special)
                spans = self._spans(encoding, text, len(parts[0]))
                rows = [self._row(template.filled(part)[0], spans=spans) for part in parts]
                if prompt is not None:
                    rows[0] = replace(rows[0], prompt=prompt.tokens)
                known[text] = rows, self._dropped_tokens - before
            self._add(rows)

    def add_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Add (query, document) pairs, of which the document may be cut, or (source, target) pairs, where both may."""
        firsts = list(dict.fromkeys(first for first, _ in pairs))
        ids = {text: tuple(encoding.ids) for text, encoding in zip(firsts, self._encoded(firsts), strict=True)}
        encodings = self._encoded([second for _, second in pairs])
        known: dict[str, tuple[tuple[int, ...], tuple[TokenSpan, ...] | None]] = {}
        for first, text in pairs:
            if text not in known:
                encoding = next(encodings)
                known[text] = tuple(encoding.ids), self._spans(encoding, text, self._target_room)
            if self._spec.has_target:
                self._add_source_and_target(ids[first], *known[text])
            else:
                self._add_query_and_document(ids[first], known[text][0])

    def build(self) -> Tokenized:
        query: int | None = None
        if self._request.task == "explain":
            text = self._request.texts[0] if self._request.texts else None
            query = _find_query(self._rows[0], self._request.query, text)
        counts = tuple(self._rows_per_input)
        return Tokenized(tuple(self._rows), counts, len(self._cut_inputs), self._dropped_tokens, query)

    def _encoded(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Of each different text, in the order of the first ones."""
        return self._tokenizer.encode(list(dict.fromkeys(texts)), self._checkpoint)

    @property
    def _target_room(self) -> int:
        return self._spec.max_length - self._tokenizer.single.special

    def _add_source_and_target(
        self, source_ids: tuple[int, ...], target_ids: tuple[int, ...], spans: tuple[TokenSpan, ...] | None
    ) -> None:
        """`spans`: of as many of the target's tokens as there is room for."""
        template, room = self._tokenizer.single, self._target_room
        (source,) = self._fit(source_ids, room, added=template.special)
        (target,) = self._fit(target_ids, room, added=template.special)
        target_ids, _ = template.filled(target)
        if not target_ids:
            raise invalid(f"input {self._index}: the target has no tokens", param="target")
        self._add([self._row(template.filled(source)[0], target=target_ids, spans=spans)])

    def _add_query_and_document(self, query: tuple[int, ...], document_ids: tuple[int, ...]) -> None:
        template = self._tokenizer.pair
        room = self._spec.max_length - template.special - len(query)
        if room < 1 and self._options.truncate != "error":
            raise invalid(
                f"input {self._index}: the query alone has {len(query)} of the {self._spec.max_length} tokens",
                param="query",
            )
        (document,) = self._fit(document_ids, room, added=template.special + len(query))
        ids, types = template.filled(query, document)
        self._add([self._row(ids, types=types if self._spec.has_types and any(types) else None)])

    def _fit(self, ids: tuple[Token, ...], room: int, added: int = 0) -> list[tuple[Token, ...]]:
        """`ids` in parts of at most `room`: all of it, its beginning, or overlapping chunks, as `truncate` says.

        `added`: tokens that each part gets besides, for the message.
        """
        excess = len(ids) - room
        if excess <= 0:
            return [ids]
        if self._options.truncate == "chunk":
            overlap = self._options.chunk_overlap
            if overlap * 2 > room:
                raise invalid(f"chunk_overlap {overlap} is over half of a chunk's {room} tokens", param="chunk_overlap")
            return [ids[at : at + room] for at in range(0, len(ids) - overlap, room - overlap)]
        if self._options.truncate == "error":
            raise self._too_long(len(ids) + added)
        self._cut(excess)
        # tokens that are reported one by one stay those of the beginning, as their positions are
        return [ids[excess:] if self._spec.cuts_left and not self._keeps_spans else ids[:room]]

    def _cut(self, tokens: int) -> None:
        """So many tokens of the input that is being added are left out."""
        if tokens:
            self._cut_inputs.add(self._index)
            self._dropped_tokens += tokens

    def _too_long(self, length: int) -> FarsightError:
        or_chunk = ' or "chunk"' if isinstance(self._options, EmbedOptions) else ""
        return FarsightError(
            Kind.TOO_LARGE,
            f"input {self._index} has {length} tokens, over the {self._spec.max_length} of model {self._spec.model!r}; "
            f'shorten it, or set "truncate": "end"{or_chunk}',
            code="context_length_exceeded",
            param="input",
        )

    def _spans(self, encoding: Encoding, text: str, count: int) -> tuple[TokenSpan, ...] | None:
        return self._tokenizer.spans(encoding, text, count) if self._keeps_spans else None

    def _row(
        self,
        ids: tuple[int, ...],
        *,
        types: tuple[int, ...] | None = None,
        target: tuple[int, ...] | None = None,
        spans: tuple[TokenSpan, ...] | None = None,
    ) -> EncodedInput:
        if not ids:
            raise invalid(f"input {self._index} has no tokens", param="input")
        for tokens in (ids, target or ids):  # a tokenizer may know more tokens than its model
            low, high = min(tokens), max(tokens)
            if low < 0 or high >= self._spec.vocab_size:
                token, limit = low if low < 0 else high, self._spec.vocab_size - 1
                raise invalid(f"input {self._index}: token id {token} is outside 0..{limit}", param="input")
        if types is None and self._spec.always_types:
            types = (0,) * len(ids)
        return EncodedInput(ids, types, target, spans=spans)

    def _add(self, rows: list[EncodedInput]) -> None:
        self._rows += rows
        self._rows_per_input.append(len(rows))


def _find_query(row: EncodedInput, query: int | str | None, text: str | None) -> int:
    """Index of the query token: `query` is an index (negative: from the end) or a part of the text.

    A part of the text means the token where it begins. A whole word is preferred to a match inside a word.
    """
    if isinstance(query, str):
        word = re.search(rf"(?<!\w){re.escape(query)}(?!\w)", text or "") if query else None
        start = word.start() if word else (text or "").find(query) if query else -1
        if start < 0:
            raise invalid(f"query: {query[:64]!r} is not in the text", param="query")
        for index, span in enumerate(row.spans or ()):
            if not span.is_special and span.start <= start < span.end:
                return index
        raise invalid(f"query: {query[:64]!r} is in the text, but not in its tokens (cut off?)", param="query")
    if query is None:
        raise invalid("query: expected the index of a token or a part of the text", param="query")
    if not -len(row.ids) <= query < len(row.ids):
        raise invalid(f"query: token {query} is outside the {len(row.ids)} tokens", param="query")
    return query % len(row.ids)
