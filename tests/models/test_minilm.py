"""The real model: equal to sentence-transformers, packed equal to single, lengths counted, chunks merged, explained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from service.core.plan import PlanKind
from service.errors import FarsightError, Kind
from service.models.files import directory_of
from service.models.hook import ForwardContext
from service.models.inputs.processor import InputProcessor
from service.models.loading.load import load
from service.models.model import Model
from tests.conftest import MINILM
from tests.models.common import SETTINGS, asked, run

TEXTS = [
    "The animal didn't cross the street because it was tired.",
    "",
    "Attention compares every token with every other, and somebody pays.",
    "café ☕ naïve 東京 🦉",
    "word " * 120,
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(MINILM, SETTINGS)


def embed(model: Model, *texts: str, **options: object) -> torch.Tensor:
    (computed,) = run(model, asked("embed", *texts, **options))
    return computed.tensors["embedding"]


def test_embeddings_equal_sentence_transformers(model: Model) -> None:
    from sentence_transformers import SentenceTransformer

    expected = torch.from_numpy(SentenceTransformer(str(directory_of(MINILM)), device="cpu").encode(TEXTS))
    got = embed(model, *TEXTS)
    assert torch.nn.functional.cosine_similarity(got, expected).min() >= 0.9999
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_packed_equals_each_alone(model: Model, kind: PlanKind) -> None:
    (together,) = run(model, asked("embed", *TEXTS), context=ForwardContext(kind))
    alone = torch.cat([embed(model, text) for text in TEXTS])
    assert (together.tensors["embedding"] - alone).abs().max() < 1e-5


def test_requests_of_one_batch_get_their_own_rows(model: Model) -> None:
    first, second = run(model, asked("embed", *TEXTS[:2]), asked("embed", *TEXTS[2:]))
    assert torch.equal(first.tensors["embedding"], embed(model, *TEXTS)[:2])
    assert torch.equal(second.tensors["embedding"], embed(model, *TEXTS)[2:])


def test_too_long_a_text_is_refused_with_both_lengths(model: Model) -> None:
    with pytest.raises(FarsightError) as caught:
        model.tokenize(asked("embed", "short", "word " * 400))
    assert caught.value.kind is Kind.TOO_LARGE
    assert "input 1 has 402 tokens, over the 256" in caught.value.message


def test_cut_text_is_counted_and_equals_the_cut(model: Model) -> None:
    tokenized = model.tokenize(asked("embed", "word " * 400, truncate="end"))
    assert (tokenized.truncated, tokenized.dropped_tokens) == (1, 146)
    assert [row.ids for row in tokenized.rows] == [model.tokenize(asked("embed", "word " * 254)).rows[0].ids]


def test_chunks_overlap_and_are_merged_by_their_tokens(model: Model) -> None:
    words = [f"word{number % 7} is number {number}" for number in range(200)]
    text = " ".join(words)
    tokenized = model.tokenize(asked("embed", "short", text, truncate="chunk", chunk_overlap=50))
    count = tokenized.rows_per_input[1]
    assert tokenized.rows_per_input == (1, count)
    assert tokenized.chunks == count > 3
    assert (tokenized.truncated, tokenized.dropped_tokens) == (0, 0)
    rows = tokenized.rows[1:]
    assert all(len(row) <= 256 for row in rows)
    for before, after in pairwise(rows):  # neighbours share 50 tokens inside [CLS] and [SEP]
        assert before.ids[-51:-1] == after.ids[1:51]
    inner = [rows[0].ids[1:-1], *(row.ids[51:-1] for row in rows[1:])]
    longer = InputProcessor(replace(model.inputs.spec, max_length=100_000), 1)
    whole = longer.encode(asked("embed", text)).rows[0].ids
    assert sum(inner, ()) == whole[1:-1]

    got = embed(model, "short", text, truncate="chunk", chunk_overlap=50)
    (alone,) = run(model, asked("embed", token_ids=tuple(row.ids for row in rows)))
    weights = torch.tensor([float(len(row)) for row in rows])[:, None]
    merged = (alone.tensors["embedding"] * weights).sum(0) / weights.sum()
    assert torch.allclose(got[1], torch.nn.functional.normalize(merged, dim=0), atol=1e-5)
    assert torch.allclose(got[0], embed(model, "short")[0], atol=1e-6)


def test_chunks_of_token_ids_cover_them(model: Model) -> None:
    ids = tuple(range(1000, 2000))
    rows = model.tokenize(asked("embed", token_ids=(ids,), truncate="chunk", chunk_overlap=56)).rows
    assert rows[0].ids == ids[:256]
    assert rows[-1].ids[-1] == ids[-1]
    assert sum([rows[0].ids, *(row.ids[56:] for row in rows[1:])], ()) == ids


def test_an_overlap_that_leaves_no_room_is_refused(model: Model) -> None:
    with pytest.raises(FarsightError, match="chunk_overlap 200 is over half of a chunk's 254 tokens"):
        model.tokenize(asked("embed", "word " * 400, truncate="chunk", chunk_overlap=200))


def test_too_large_a_text_is_refused_before_it_is_tokenised(model: Model) -> None:
    small = InputProcessor(replace(model.inputs.spec, max_text_bytes=100), 1)
    with pytest.raises(FarsightError) as caught:
        small.encode(asked("embed", "x" * 101, truncate="end"))
    assert caught.value.message == "input 0: 101 bytes is over the limit of 100 bytes"
    with pytest.raises(FarsightError, match="all texts together: 1700 bytes is over the limit of 1600 bytes"):
        small.encode(asked("embed", *(f"{number:0100d}" for number in range(17))))


@pytest.mark.parametrize(
    ("ids", "message"), [((), "no tokens"), ((1, -1), "token id -1"), ((30522,), "token id 30522")]
)
def test_token_ids_are_checked(model: Model, ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(FarsightError, match=message):
        model.tokenize(asked("embed", token_ids=(ids,)))


def test_dimensions_are_cut_and_normalised_again(model: Model) -> None:
    whole, cut = embed(model, TEXTS[0]), embed(model, TEXTS[0], dimensions=64)
    assert torch.allclose(cut, torch.nn.functional.normalize(whole[:, :64], dim=-1), atol=1e-6)


def test_attention_runs_through_ours_and_a_checkpoint_stops_it(model: Model) -> None:
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model, asked("embed", *TEXTS), context=ForwardContext(PlanKind.DENSE, checkpoint=checkpoint))


def test_the_token_it_is_explained_in_words(model: Model) -> None:
    (computed,) = run(model, asked("explain", TEXTS[0], query="it", rollout=True))
    explanation = computed.details
    assert explanation["query"] == {"index": 10, "text": "it", "offsets": [43, 45]}
    assert TEXTS[0][43:45] == "it"
    assert len(explanation["layers"]) == 6
    named = {token["text"] for layer in explanation["layers"] for head in layer["heads"] for token in head["top"]}
    assert {"animal", "tired", "street", "[CLS]", "[SEP]"} <= named
    for layer in explanation["layers"]:
        assert len(layer["heads"]) == 12
        for head in layer["heads"]:
            assert sum(token["weight"] for token in head["top"]) <= 1 + 1e-5
            assert 0 <= head["entropy_bits"] <= 4
    assert explanation["rollout"][0]["weight"] < 1


def test_rollout_equals_the_product_of_whole_matrices(model: Model) -> None:
    import transformers

    eager = transformers.AutoModel.from_pretrained(directory_of(MINILM), attn_implementation="eager").eval()
    row = model.tokenize(asked("embed", TEXTS[0])).rows[0]
    with torch.no_grad():
        layers = eager(input_ids=torch.tensor([row.ids]), output_attentions=True).attentions
    flow = torch.eye(len(row.ids))
    for layer in layers:
        flow = (0.5 * layer[0].mean(0) + 0.5 * torch.eye(len(row.ids))) @ flow
    (computed,) = run(model, asked("explain", TEXTS[0], query=10, rollout=True, top_k=100))
    for token in computed.details["rollout"]:
        assert token["weight"] == pytest.approx(flow[10, token["index"]].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("query", "text"),
    [("cross", "cross"), ("tire", "tired"), ("didn't", "didn"), (-2, "."), (0, "[CLS]"), ("The animal", "The")],
)
def test_queries_name_a_token(model: Model, query: int | str, text: str) -> None:
    (computed,) = run(model, asked("explain", TEXTS[0], query=query, layers=(0,)))
    assert computed.details["query"]["text"] == text
    assert [layer["layer"] for layer in computed.details["layers"]] == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "zebra"}, "'zebra' is not in the text"),
        ({"query": 15}, "token 15 is outside the 15 tokens"),
        ({"query": ""}, "is not in the text"),
    ],
)
def test_queries_that_name_nothing(model: Model, fields: dict[str, object], message: str) -> None:
    with pytest.raises(FarsightError, match=message):
        run(model, asked("explain", TEXTS[0], **fields))


def test_longer_than_the_models_positions_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="max_length 1024 is over its 512 positions"):
        load(MINILM.model_copy(update={"max_length": 1024}), SETTINGS)


def test_max_length_can_be_raised_to_the_positions() -> None:
    assert load(MINILM.model_copy(update={"max_length": 512}), SETTINGS).info.max_length == 512


def test_a_model_whose_packing_is_broken_runs_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ForwardContext.__init__

    def blind(self: ForwardContext, *arguments: object, **fields: object) -> None:
        cu_seqlens = fields.get("cu_seqlens")
        if isinstance(cu_seqlens, tuple):
            fields["cu_seqlens"] = (0, cu_seqlens[-1])  # every token sees every token
        original(self, *arguments, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(ForwardContext, "__init__", blind)
    model = load(MINILM, SETTINGS)
    assert not model.info.packed
    alone = torch.cat([embed(model, text) for text in TEXTS])
    assert torch.allclose(embed(model, *TEXTS), alone, atol=1e-5)
