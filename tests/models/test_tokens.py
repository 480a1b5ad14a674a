"""Texts into rows: special tokens, cuts and offsets as the tokenizer's own, whatever its post-processor does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.models import BPE

from service.attention.output import Checkpoint
from service.errors import FarsightError
from service.models.inputs.processor import InputProcessor
from service.models.inputs.spec import InputSpec
from service.models.inputs.tokenizer import TextTokenizer, load_tokenizer, text_tokenizer
from tests.models import zoo
from tests.models.common import asked


def byte_level() -> Tokenizer:
    """As RoBERTa's: spaces belong to tokens, and the post-processor trims them from the offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    made.add_special_tokens(["<s>", "<pad>", "</s>"])
    return made


def inputs(tokenizer: Tokenizer, directory: Path, **fields: object) -> InputProcessor:
    zoo.save_tokenizer(tokenizer, directory)
    settings = {"max_length": 64, "vocab_size": 1000, "max_text_bytes": 1 << 20, **fields}
    spec = InputSpec("m", tokenizer=text_tokenizer(load_tokenizer(directory)), **settings)  # type: ignore[arg-type]
    return InputProcessor(spec, max_windows=1)


@pytest.mark.parametrize("make", [byte_level, zoo.tokenizer, lambda: zoo.tokenizer(with_pair_types=True)])
def test_rows_equal_the_tokenizers_own(make: type, tmp_path: Path) -> None:
    tokenizer: Tokenizer = make()
    ours = inputs(tokenizer, tmp_path, has_types=True)
    texts = ["it was tired", "", "the  animal", "café"]
    for text, row in zip(texts, ours.encode(asked("embed", *texts)).rows, strict=True):
        assert row.ids == tuple(tokenizer.encode(text).ids)
    pairs = tuple((a, b) for a in texts for b in texts)
    for (a, b), row in zip(pairs, ours.encode(asked("rerank", pairs=pairs)).rows, strict=True):
        expected = tokenizer.encode(a, b)
        assert row.ids == tuple(expected.ids)
        assert (row.types or (0,) * len(row.ids)) == tuple(expected.type_ids)


def test_spans_are_where_the_words_are(tmp_path: Path) -> None:
    text = "the animal was"
    row = inputs(byte_level(), tmp_path).encode(asked("explain", text, query="animal")).rows[0]
    assert row.spans is not None
    inner = [span for span in row.spans if not span.is_special]
    read = [text[span.start : span.end] for span in inner]
    assert read == ["t", "h", "e", " ", "a", "n", "i", "m", "a", "l", " ", "w", "a", "s"]
    model = models.WordLevel({"Ġit": 3, "it": 4, "<s>": 0, "<pad>": 1, "</s>": 2}, unk_token="<pad>")
    spaced = byte_level()
    spaced.model = model
    words = inputs(spaced, tmp_path).encode(asked("score", "it it it")).rows[0]
    assert words.spans is not None
    assert [(span.start, span.end) for span in words.spans] == [(0, 0), (0, 2), (3, 5), (6, 8), (0, 0)]


def test_a_whole_word_is_preferred(tmp_path: Path) -> None:
    text = "with it, it was tired"
    ours = inputs(zoo.tokenizer(), tmp_path)
    tokenized = ours.encode(asked("explain", text, query="it"))
    assert tokenized.query is not None
    assert tokenized.rows[0].spans is not None
    assert tokenized.rows[0].spans[tokenized.query].start == 5
    with pytest.raises(FarsightError, match=r"not in its tokens \(cut off\?\)"):
        ours.encode(asked("explain", "it " * 100 + "tired", query="tired", truncate="end"))


def test_a_long_document_costs_its_length_whatever_the_query(tmp_path: Path) -> None:
    ours = inputs(zoo.tokenizer(), tmp_path, max_length=512)
    document, query = "it " * 100_000, "was " * 500
    start = time.process_time()
    (row,) = ours.encode(asked("rerank", pairs=((query, document),), truncate="end")).rows
    assert len(row) == 512
    assert time.process_time() - start < 10  # 500 tokens of query for each 9 of the document took minutes


def test_a_query_is_encoded_once_and_counts_once(tmp_path: Path) -> None:
    ours = inputs(zoo.tokenizer(), tmp_path, max_length=100_000, max_text_bytes=100_000)
    query = "it " * 30_000
    rows = ours.encode(asked("rerank", pairs=tuple((query, f"{number}") for number in range(30)))).rows
    assert len(rows) == 30
    assert rows[0].ids[:1000] == rows[29].ids[:1000]


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    tokenizer = zoo.tokenizer()
    tokenizer.add_tokens(["<extra>"])
    ours = inputs(tokenizer, tmp_path, vocab_size=tokenizer.get_vocab_size() - 1)
    assert ours.encode(asked("embed", "it was"))
    with pytest.raises(FarsightError, match="is outside 0"):
        ours.encode(asked("embed", "it <extra>"))


def test_a_source_and_a_target_that_are_cut_are_one_input(tmp_path: Path) -> None:
    ours = inputs(zoo.tokenizer(), tmp_path, has_target=True)
    tokenized = ours.encode(asked("score", pairs=(("it " * 100, "was " * 90),), truncate="end"))
    assert (tokenized.truncated, tokenized.dropped_tokens) == (1, 100 + 90 - 2 * 62)
    assert len(tokenized.rows[0].ids) == len(tokenized.rows[0].target or ()) == 64


def test_texts_that_occur_more_than_once_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = inputs(zoo.tokenizer(), tmp_path, has_types=True)
    plain, encoded, encode = ours.spec.tokenizer, [], TextTokenizer.encode
    assert plain is not None

    def counted(self: TextTokenizer, texts: Sequence[str], checkpoint: Checkpoint) -> Iterator[Encoding]:
        encoded.extend(texts)
        return encode(self, texts, checkpoint)

    long, short = "it " * 100, "was tired"
    alone = [ours.encode(asked("embed", text, truncate="end")) for text in (long, short)]
    chunked = ours.encode(asked("embed", long, truncate="chunk", chunk_overlap=4))
    ranked = [ours.encode(asked("rerank", pairs=(pair,), truncate="end")) for pair in (("it", long), ("was", long))]
    monkeypatch.setattr(TextTokenizer, "encode", counted)

    many = ours.encode(asked("embed", long, short, long, short, long, truncate="end"))
    assert encoded == [long, short]
    assert many.rows == tuple(alone[index].rows[0] for index in (0, 1, 0, 1, 0))
    assert (many.truncated, many.dropped_tokens) == (3, 3 * alone[0].dropped_tokens)
    parts = ours.encode(asked("embed", long, short, long, truncate="chunk", chunk_overlap=4))
    assert parts.rows == (*chunked.rows, *alone[1].rows, *chunked.rows)
    assert parts.rows_per_input == (len(chunked.rows), 1, len(chunked.rows))
    assert (parts.truncated, parts.dropped_tokens) == (0, 0)

    encoded.clear()
    both = ours.encode(asked("rerank", pairs=(("it", long), ("was", long), ("it", long)), truncate="end"))
    assert encoded == ["it", "was", long]
    assert both.rows == (*ranked[0].rows, *ranked[1].rows, *ranked[0].rows)
    assert (both.truncated, both.dropped_tokens) == (3, 2 * ranked[0].dropped_tokens + ranked[1].dropped_tokens)


def test_encoding_stops_between_blocks_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.models.inputs.tokenizer.ENCODE_BYTES", 100)
    ours = inputs(zoo.tokenizer(), tmp_path)
    blocks = 0

    def stop() -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 3:
            raise InterruptedError

    texts = [f"{number} " * 20 for number in range(10, 20)]  # 60 bytes each
    with pytest.raises(InterruptedError):
        ours.encode(asked("embed", *texts), stop)
    assert blocks == 3
    assert len(ours.encode(asked("embed", *texts), stop).rows) == 10
    assert blocks == 3 + 10
