"""The real model: equal to sentence-transformers, packed equal to single, lengths told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from service.config import ModelConfig
from service.core import Plan, PlanKind, Work
from service.errors import FarsightError, Kind
from service.models import hook
from service.models.files import directory_of
from service.models.registry import Model, load
from tests.conftest import MINILM

CPU = torch.device("cpu")
PLAN = Plan(PlanKind.DENSE, Work(0, 0, 0, 0), 0.0, "test")
TEXTS = [
    "The animal didn't cross the street because it was tired.",
    "",
    "Attention compares every token with every other, and somebody pays.",
    "café ☕ naïve 東京 🦉",
    "word " * 120,
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(MINILM, CPU, 1 << 20)


def test_embeddings_equal_sentence_transformers(model: Model) -> None:
    from sentence_transformers import SentenceTransformer

    expected = torch.from_numpy(SentenceTransformer(str(directory_of(MINILM)), device="cpu").encode(TEXTS))
    got = model.embed(model.tokenize(TEXTS, "error").token_ids, PLAN)
    assert torch.nn.functional.cosine_similarity(got, expected).min() >= 0.9999
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_packed_equals_each_alone(model: Model, kind: PlanKind) -> None:
    plan = Plan(kind, Work(0, 0, 0, 0), 0.0, "test")
    ids = model.tokenize(TEXTS, "error").token_ids
    together = model.embed(ids, plan)
    alone = torch.cat([model.embed([one], PLAN) for one in ids])
    assert (together - alone).abs().max() < 1e-5


def test_too_long_a_text_is_refused_with_both_lengths(model: Model) -> None:
    with pytest.raises(FarsightError) as caught:
        model.tokenize(["short", "word " * 400], "error")
    assert caught.value.kind is Kind.TOO_LARGE
    assert "input 1 has 402 tokens, over the 256" in caught.value.message


def test_cut_text_is_counted_and_equals_the_cut(model: Model) -> None:
    tokenized = model.tokenize(["word " * 400], "end")
    assert (tokenized.truncated, tokenized.dropped_tokens) == (1, 146)
    assert tokenized.token_ids == model.tokenize(["word " * 254], "error").token_ids


def test_too_large_a_text_is_refused_before_it_is_tokenised() -> None:
    small = load(MINILM, CPU, max_text_bytes=100)
    with pytest.raises(FarsightError) as caught:
        small.tokenize(["x" * 101], "end")
    assert caught.value.message == "input 0: 101 bytes is over the limit of 100 bytes"


@pytest.mark.parametrize(
    ("ids", "message"), [((), "no tokens"), ((1, -1), "token id -1"), ((30522,), "token id 30522")]
)
def test_token_ids_are_checked(model: Model, ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(FarsightError, match=message):
        model.check_ids([ids], "error")


def test_dimensions_are_cut_and_normalised_again(model: Model) -> None:
    ids = model.tokenize(TEXTS[:1], "error").token_ids
    whole, cut = model.embed(ids, PLAN), model.embed(ids, PLAN, dimensions=64)
    assert torch.allclose(cut, torch.nn.functional.normalize(whole[:, :64], dim=-1), atol=1e-6)


def test_attention_runs_through_ours_and_a_checkpoint_stops_it(model: Model) -> None:
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.embed(model.tokenize(TEXTS, "error").token_ids, PLAN, checkpoint=checkpoint)


def test_a_mask_is_refused_not_ignored() -> None:
    context = hook.ForwardContext(PLAN, (0, 2))
    query = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="no attention mask"):
        hook.attention(torch.nn.Module(), query, query, query, torch.ones(1, 1, 2, 2), farsight=context)


def test_longer_than_the_models_positions_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="max_length 1024 is over its 512 positions"):
        load(MINILM.model_copy(update={"max_length": 1024}), CPU, 1 << 20)


def test_max_length_can_be_raised_to_the_positions() -> None:
    assert load(MINILM.model_copy(update={"max_length": 512}), CPU, 1 << 20).info.max_length == 512


def test_missing_files_and_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        directory_of(ModelConfig(name="m", path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        directory_of(ModelConfig(name="m", package="no_such_package"))


def test_unproven_architectures_are_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(directory_of(MINILM), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="architecture 'gpt2' is not served yet"):
        load(ModelConfig(name="m", path=str(tmp_path / "model")), CPU, 1 << 20)


def test_a_model_whose_packing_is_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(cu_seqlens: tuple[int, ...]) -> tuple[int, ...]:
        return (0, cu_seqlens[-1])  # everybody sees everybody

    original = hook.ForwardContext

    def context(plan: Plan, cu_seqlens: tuple[int, ...], checkpoint: object = None) -> hook.ForwardContext:
        return original(plan, blind(cu_seqlens), None)

    monkeypatch.setattr(hook, "ForwardContext", context)
    with pytest.raises(RuntimeError, match="packed embeddings differ"):
        load(MINILM, CPU, 1 << 20)
