"""A model's tokenizer, and where it puts special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from service.models.inputs.rows import TokenSpan

ENCODE_BYTES = 4 * 1024**2  # of the texts that are encoded together: an encoding takes ~500 bytes a token


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

    def pieces(self, encoding: Encoding, text: str, count: int) -> tuple[TokenSpan, ...]:
        """The tokens of one sequence that was cut to `count`, special ones included."""
        own = zip(encoding.tokens[:count], encoding.offsets[:count], strict=True)
        found: list[TokenSpan] = []
        for part in self.single.parts:
            if part is not None:
                found.append(TokenSpan(self.plain.id_to_token(part[0]) or "", 0, 0, is_special=True))
                continue
            for name, (start, end) in own:
                piece = text[start:end]
                spaces = len(piece) - len(piece.lstrip()) if piece.strip() else 0
                found.append(TokenSpan(name, start + spaces, start + len(piece.rstrip()) if spaces else end, False))
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
