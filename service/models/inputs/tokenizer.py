"""A model's tokenizer, and where it puts special tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer, normalizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from service.attention.output import Checkpoint, no_checkpoint
from service.models.inputs.rows import TokenSpan

ENCODE_BYTES = 64 * 1024  # of texts that are encoded together: then others get their turn
# on the thread that asks: its work is measured, and others' cores are left to them
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True, slots=True)
class Template:
    """Where special tokens go around one or two sequences.

    `parts`: a special token as (id, token type), or None where the next sequence goes.
    """

    parts: tuple[tuple[int, int] | None, ...]
    types: tuple[int, ...]  # token type of each sequence

    @property
    def special(self) -> int:
        """Number of special tokens."""
        return sum(part is not None for part in self.parts)

    def filled(self, *sequences: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, token types) of one row: `sequences` with the special tokens around them."""
        ids: list[int] = []
        types: list[int] = []
        remaining = iter(zip(sequences, self.types, strict=True))
        for part in self.parts:
            if part is not None:
                ids.append(part[0])
                types.append(part[1])
            else:
                sequence, token_type = next(remaining)
                ids += sequence
                types += [token_type] * len(sequence)
        return tuple(ids), tuple(types)


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer without its post-processor, and templates of what the post-processor adds.

    The post-processor itself is not used: its truncation keeps everything that it cuts, and offsets are wrong if it
    runs twice.
    """

    plain: Tokenizer
    single: Template
    pair: Template

    def encode(self, texts: Sequence[str], checkpoint: Checkpoint = no_checkpoint) -> Iterator[Encoding]:
        """Encode without special tokens, at most ENCODE_BYTES of text between two checkpoints, or one text."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and size + len(text) > ENCODE_BYTES:
                checkpoint()
                yield from self.plain.encode_batch(batch, add_special_tokens=False)
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        checkpoint()
        yield from self.plain.encode_batch(batch, add_special_tokens=False)

    def spans(self, encoding: Encoding, text: str, count: int) -> tuple[TokenSpan, ...]:
        """The first `count` tokens of `text`, with the special tokens of one sequence around them."""
        tokens = list(zip(encoding.tokens[:count], encoding.offsets[:count], strict=True))
        spans: list[TokenSpan] = []
        for part in self.single.parts:
            if part is not None:
                spans.append(TokenSpan(self.plain.id_to_token(part[0]) or "", 0, 0, is_special=True))
            else:
                spans += [TokenSpan(name, *_trimmed(text, *offsets), is_special=False) for name, offsets in tokens]
        return tuple(spans)

    def name(self, token: int) -> str:
        """A token id as readable text."""
        return self.plain.decode([token], skip_special_tokens=False)


def load_tokenizer(directory: Path, *, lower_case: bool = False) -> Any:
    """The tokenizer that Transformers makes of the directory. `lower_case`: of all text, as sentence-transformers does.

    Raises ValueError if it cannot be read, or runs in Python only.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"its tokenizer cannot be read: {type(error).__name__}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"its tokenizer {type(tokenizer).__name__} runs in Python only; a tokenizer.json is needed")
    if lower_case:
        _make_lower_case(tokenizer.backend_tokenizer)
    return tokenizer


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """What we use of a loaded tokenizer: without truncation and padding, both of which would hide what was cut."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.post_processor = None
    plain.encode_special_tokens = bool(tokenizer.split_special_tokens)
    # the post-processor knows its own ids: any vocabulary shows where it puts them
    probe = Tokenizer(WordLevel({"a": 0}, unk_token="a"))  # noqa: S106 (not a password)
    if backend.post_processor is not None:
        probe.post_processor = backend.post_processor
    return TextTokenizer(plain, _template(probe.encode("a")), _template(probe.encode("a", "a")))


def _make_lower_case(backend: Tokenizer) -> None:
    present: Any = backend.normalizer
    is_sequence = isinstance(present, normalizers.Sequence)
    parts = list(present) if is_sequence else [] if present is None else [present]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def _template(processed: Encoding) -> Template:
    """Where the post-processor put special tokens in a sample of one or two sequences."""
    parts: list[tuple[int, int] | None] = []
    types: dict[int, int] = {}
    for sequence, token, token_type in zip(processed.sequence_ids, processed.ids, processed.type_ids, strict=True):
        if sequence is None:
            parts.append((token, token_type))
        elif sequence not in types:
            parts.append(None)
            types[sequence] = token_type
    return Template(tuple(parts), tuple(types[at] for at in sorted(types)))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """(start, end) without leading spaces, nor trailing ones if there are leading ones; only spaces: unchanged."""
    piece = text[start:end]
    spaces = len(piece) - len(piece.lstrip()) if piece.strip() else 0
    return (start + spaces, start + len(piece.rstrip())) if spaces else (start, end)
