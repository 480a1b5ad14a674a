"""Every architecture against Transformers' own eager attention, one input at a time, from the saved files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from service.core.options import Task
from service.core.plan import PlanKind
from service.models.hook import ForwardContext
from tests.models import zoo
from tests.models.common import asked, loaded, run

TEXTS = (
    "attention compares every token with every other token and somebody pays",
    "tired",
    "the animal did not cross the street because it was tired, long documents are read by machines",
)
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
DECODERS = ("gpt2", "llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
WITH_TARGET = ("t5", "bart")


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([zoo.tokenizer().encode(text).ids])


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS, *WITH_TARGET])
@pytest.mark.parametrize("attention", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_hidden_states_of_a_batch_equal_each_alone(kind: str, attention: PlanKind, tmp_path: Path) -> None:
    module = zoo.save(kind, hf.AutoModel, tmp_path)
    encoder = module.get_encoder() if kind in WITH_TARGET else module
    model = loaded(tmp_path)
    assert model.info.packed == (kind not in WITH_TARGET)
    for layer in (-1, 1):
        request = asked("hidden", *TEXTS, layer=layer)
        (got,) = run(model, request, context=ForwardContext(attention))
        parts = got.tensors["hidden_states"].split(got.tensors["lengths"].tolist())
        for text, part in zip(TEXTS, parts, strict=True):
            with torch.no_grad():
                expected = encoder(input_ids=ids_of(text), output_hidden_states=True)
            assert (part - expected.hidden_states[layer][0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS, *WITH_TARGET])
def test_classes_of_a_batch_equal_each_alone(kind: str, tmp_path: Path) -> None:
    more = {"id2label": {0: "no", 1: "maybe", 2: "yes"}}
    more |= {"pad_token_id": 0} if kind == "gpt2" else {"eos_token_id": 2} if kind in WITH_TARGET else {}
    module = zoo.save(kind, hf.AutoModelForSequenceClassification, tmp_path, **more)
    model = loaded(tmp_path)
    assert (model.info.task, model.info.labels) == ("classify", ("no", "maybe", "yes"))
    (raw,) = run(model, asked("classify", *TEXTS, raw_scores=True))
    (probable,) = run(model, asked("classify", *TEXTS))
    for index, text in enumerate(TEXTS):
        with torch.no_grad():
            logits = module(input_ids=ids_of(text)).logits[0]
        assert (raw.tensors["scores"][index] - logits).abs().max() < 1e-4
        assert torch.allclose(probable.tensors["scores"][index], logits.softmax(0), atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_scores_of_a_batch_equal_each_alone(kind: str, tmp_path: Path) -> None:
    module = zoo.save(kind, hf.AutoModelForCausalLM, tmp_path)
    model = loaded(tmp_path)
    assert model.info.task == "score"
    (got,) = run(model, asked("score", *TEXTS, top_k=3, positions=(-1, 0)))
    for scores, text in zip(got.details, TEXTS, strict=True):
        ids = ids_of(text)
        with torch.no_grad():
            logprobs = module(input_ids=ids).logits[0].log_softmax(1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        assert scores["token_logprobs"][0] is None
        assert torch.allclose(torch.tensor(scores["token_logprobs"][1:]), expected, atol=1e-4)
        assert scores["perplexity"] == pytest.approx((-expected.mean()).exp().item(), rel=1e-3)
        assert [entry["position"] for entry in scores["top"]] == [len(ids[0]) - 1, 0]
        for entry in scores["top"]:
            best = logprobs[entry["position"]].topk(3)
            assert [token["token_id"] for token in entry["next"]] == best.indices.tolist()
            assert [token["logprob"] for token in entry["next"]] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", WITH_TARGET)
def test_targets_are_scored_given_their_sources(kind: str, tmp_path: Path) -> None:
    module = zoo.save(kind, hf.AutoModelForSeq2SeqLM, tmp_path)
    model = loaded(tmp_path)
    assert (model.info.task, model.info.inputs) == ("score", "source and target")
    pairs = ((TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0]), (TEXTS[1], TEXTS[1]))
    (got,) = run(model, asked("score", pairs=pairs, top_k=2))
    for scores, (source, target) in zip(got.details, pairs, strict=True):
        labels = ids_of(target)
        with torch.no_grad():
            expected = module(input_ids=ids_of(source), labels=labels)
        assert scores["scored_tokens"] == labels.shape[1]
        assert -scores["logprob_sum"] / labels.shape[1] == pytest.approx(expected.loss.item(), abs=1e-4)
        best = expected.logits[0, -1].log_softmax(0).topk(2)
        assert [token["token_id"] for token in scores["top"][0]["next"]] == best.indices.tolist()


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_explained_weights_equal_output_attentions(kind: str, tmp_path: Path) -> None:
    module = zoo.save(kind, hf.AutoModel, tmp_path)
    model = loaded(tmp_path)
    length = ids_of(TEXTS[2]).shape[1]
    (got,) = run(model, asked("explain", TEXTS[2], query=-3, top_k=length))
    with torch.no_grad():
        expected = module(input_ids=ids_of(TEXTS[2]), output_attentions=True).attentions
    assert len(got.details["layers"]) == len(expected)
    for explained, layer in zip(got.details["layers"], expected, strict=True):
        for head in explained["heads"]:
            weights = torch.zeros(length)
            for token in head["top"]:
                weights[token["index"]] = token["weight"]
            assert (weights - layer[0, head["head"], length - 3]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "gemma2", "t5", "bart"])
def test_bfloat16_stays_within_twice_the_error_of_eager_bfloat16(kind: str, tmp_path: Path) -> None:
    module = zoo.save(kind, hf.AutoModel, tmp_path)
    model = loaded(tmp_path, dtype="bfloat16")
    (got,) = run(model, asked("hidden", *TEXTS))
    parts = got.tensors["hidden_states"].float().split(got.tensors["lengths"].tolist())
    ours, theirs = [], []
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        encoder = module.get_encoder() if kind in WITH_TARGET else module
        with torch.no_grad():
            states = [encoder(input_ids=ids_of(text)).last_hidden_state[0].float() for text in TEXTS]
        if dtype is torch.float32:
            exact = states
        else:
            theirs = [(a - b).norm() / b.norm() for a, b in zip(states, exact, strict=True)]
    ours = [(a - b).norm() / b.norm() for a, b in zip(parts, exact, strict=True)]
    assert sum(ours) <= 2 * sum(theirs)


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_images(task: Task, tmp_path: Path) -> None:
    head = hf.AutoModelForImageClassification if task == "classify" else hf.AutoModel
    module = zoo.save("vit", head, tmp_path, id2label={0: "cat", 1: "dog"})
    model = loaded(tmp_path)
    assert (model.info.task, model.info.inputs, model.info.max_length) == (task, "image", 17)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (got,) = run(model, asked(task, features=pixels))
    with torch.no_grad():
        expected = module(pixel_values=pixels)
    if task == "classify":
        assert torch.allclose(got.tensors["scores"], expected.logits.softmax(1), atol=1e-5)
    else:
        states = torch.nn.functional.normalize(expected.last_hidden_state[:, 0], dim=1)
        assert torch.allclose(got.tensors["embedding"], states, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
)
def test_rope_scaling_by_configuration(scaling: dict[str, Any], tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModel, tmp_path, max_position_embeddings=32)
    model = loaded(tmp_path, rope_scaling=scaling)
    assert model.info.max_length == 128
    assert model.info.packed == (scaling["rope_type"] != "dynamic")  # a longer neighbour would change its frequencies
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "original_max_position_embeddings": 32, **scaling}
    if scaling["rope_type"] != "dynamic":  # which begins where an input is over the model's own length
        config["max_position_embeddings"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 128, (n,), generator=generator) for n in (100, 20, 60)]
    request = asked("hidden", token_ids=tuple(tuple(row.tolist()) for row in rows))
    for _ in range(2):  # the second answer must not depend on the first
        (got,) = run(model, request)
        parts = got.tensors["hidden_states"].split(got.tensors["lengths"].tolist())
        for row, part in zip(rows, parts, strict=True):
            fresh = hf.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
            with torch.no_grad():
                expected = fresh(input_ids=row[None]).last_hidden_state[0]
            assert (part - expected).abs().max() < 1e-4
    unscaled = loaded(tmp_path, rope_scaling={"rope_type": "default"})
    (without,) = run(unscaled, replace(request, token_ids=(request.token_ids[1],)))
    (with_it,) = run(model, replace(request, token_ids=(request.token_ids[1],)))
    same = torch.allclose(without.tensors["hidden_states"], with_it.tensors["hidden_states"], atol=1e-4)
    assert same == (scaling["rope_type"] == "dynamic")  # 20 tokens are within the model's own 32
