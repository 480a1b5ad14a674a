"""What transformers are asked for over HTTP, in process: small models of every kind behind the real engine."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from prometheus_client import CollectorRegistry

from service.api.http.app import create_app
from service.config import Config, ModelConfig
from service.engine.engine import Engine
from service.telemetry.metrics import Metrics
from tests.api.common import caller
from tests.models import zoo
from tests.models.test_directories import old_layout, plain

IDS = ["input_ids", "attention_mask", "token_type_ids"]
PROMPTS = {"query": "the animal ", "passage": "the street "}
TEXTS = ["the animal did not cross", "it was tired", "long documents are read by machines"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("models")
    labels = {0: "no", 1: "maybe", 2: "yes"}
    zoo.save("bert", hf.AutoModelForSequenceClassification, root / "classifier", id2label=labels)
    zoo.save("bert", hf.AutoModelForSequenceClassification, root / "ranker", id2label={0: "relevant"})
    zoo.save("llama", hf.AutoModelForCausalLM, root / "decoder")
    zoo.save("t5", hf.AutoModelForSeq2SeqLM, root / "translator")
    zoo.save("vit", hf.AutoModelForImageClassification, root / "vision", id2label={0: "cat", 1: "dog"})
    zoo.save("vit", hf.AutoModel, root / "vision-embed")
    old_layout(plain("bert"), "mean_tokens", {"prompts": PROMPTS})(root / "embedder")
    models = tuple(
        ModelConfig(name={"embedder": "org/embedder"}.get(one.name, one.name), path=str(one))
        for one in sorted(root.iterdir())
    )
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    engine = Engine.start(
        Config(models=models, model_repository=root, model_control=True), Metrics(CollectorRegistry())
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def call(engine: Engine) -> Any:
    call = caller(create_app(engine))
    return lambda path, method="POST", **body: call(method, path, json=body if method == "POST" else None)


def picture(seed: int, file_format: str = "PNG") -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


def test_classify(call: Any) -> None:
    body = call("/v1/classify", model="classifier", input=TEXTS).json()
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    for one in body["data"]:
        assert {row["label"] for row in one["scores"]} == {"no", "maybe", "yes"}
        assert sum(row["score"] for row in one["scores"]) == pytest.approx(1, abs=1e-5)
        assert [row["score"] for row in one["scores"]] == sorted((row["score"] for row in one["scores"]), reverse=True)
        assert (one["label"], one["score"]) == (one["scores"][0]["label"], one["scores"][0]["score"])
    assert body["usage"]["total_tokens"] == sum(len(zoo.tokenizer().encode(text).ids) for text in TEXTS)
    raw = call("/v1/classify", model="classifier", input=TEXTS[0], raw_scores=True).json()["data"][0]["scores"]
    probable = torch.tensor([row["score"] for row in raw]).softmax(0).tolist()
    assert probable == pytest.approx([row["score"] for row in body["data"][0]["scores"]], abs=1e-5)


def test_rerank(call: Any) -> None:
    question = {"model": "ranker", "query": "tired", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    body = call("/v1/rerank", **question, return_documents=True).json()
    scores = [one["relevance_score"] for one in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert {one["index"]: one["document"]["text"] for one in body["results"]} == dict(enumerate(TEXTS))
    best = call("/v1/rerank", **question, top_n=1).json()["results"]
    assert call("/v1/rerank", **question, top_n="1", return_documents="false").json()["results"] == best
    assert best == [{"index": body["results"][0]["index"], "relevance_score": pytest.approx(scores[0], abs=1e-6)}]
    alone = call("/v1/rerank", **{**question, "documents": [TEXTS[2]]}).json()["results"][0]["relevance_score"]
    together = next(one["relevance_score"] for one in body["results"] if one["index"] == 2)
    assert together == pytest.approx(alone, abs=1e-5)


def test_rerank_cuts_documents_never_the_query(call: Any) -> None:
    question = {"model": "ranker", "query": "tired", "documents": ["long " * 600]}
    refused = call("/v1/rerank", **question)
    assert refused.status_code == 413
    assert "input 0 has 604 tokens, over the 512" in refused.json()["error"]["message"]
    cut = call("/v1/rerank", **question, truncate="end").json()
    assert (cut["usage"]["truncated"], cut["usage"]["dropped_tokens"], cut["usage"]["tokens"]) == (1, 92, 512)
    whole = call("/v1/rerank", model="ranker", query="long " * 600, documents=["a"], truncate="end")
    assert whole.status_code == 422
    assert "the query alone has 600 of the 512 tokens" in whole.json()["error"]["message"]


def test_score_of_a_decoder(call: Any) -> None:
    body = call("/v1/score", model="decoder", input=TEXTS, top_k=2).json()
    first = body["data"][0]
    assert first["token_logprobs"][0] is None
    assert first["logprob_sum"] == pytest.approx(sum(first["token_logprobs"][1:]), rel=1e-5)
    assert first["perplexity"] == pytest.approx(math.exp(-first["logprob_sum"] / first["scored_tokens"]), rel=1e-6)
    assert [TEXTS[0][start:end] for start, end in first["offsets"][1:-1]] == TEXTS[0].split()
    assert first["top"][0]["position"] == first["tokens"] - 1
    assert len(first["top"][0]["next"]) == 2
    brief = call("/v1/score", model="decoder", input=TEXTS[0], token_logprobs=False).json()["data"][0]
    assert "token_logprobs" not in brief
    assert brief["logprob_sum"] == pytest.approx(first["logprob_sum"], rel=1e-5)
    outside = call("/v1/score", model="decoder", input="it", top_k=1, positions=[99])
    assert (outside.status_code, outside.json()["error"]["param"]) == (422, "positions")


def test_score_of_a_target_given_its_source(call: Any) -> None:
    body = call("/v1/score", model="translator", source=TEXTS[:2], target=TEXTS[1:]).json()
    assert [one["scored_tokens"] for one in body["data"]] == [len(zoo.tokenizer().encode(one).ids) for one in TEXTS[1:]]
    missing = call("/v1/score", model="translator", input=TEXTS[0])
    assert "scores a target given its source" in missing.json()["error"]["message"]
    unequal = call("/v1/score", model="translator", source=TEXTS, target=TEXTS[:1])
    assert "expected the same number, got 3 and 1" in unequal.json()["error"]["message"]


def test_explain(call: Any) -> None:
    body = call("/v1/explain", model="decoder", text=TEXTS[0], query="cross", top_k=3, layers=[-1]).json()
    told = body["explanation"]
    assert told["query"]["text"] == "cross"
    assert [layer["layer"] for layer in told["layers"]] == [2]
    assert all(one["index"] <= told["query"]["index"] for one in told["average"])  # causal
    assert body["plan"]["kind"] in ("dense", "chunked")


def test_explain_draws_where_each_layer_reads(call: Any) -> None:
    for mode in ("auto", "sparse"):
        asked = {"model": "decoder", "text": "it was tired . " * 110, "query": 3, "mode": mode, "layers": [0, 2]}
        layers = call("/v1/explain", **asked, max_error=1.0, block_map=True).json()["explanation"]["layers"]
        for layer in layers:
            drawn = layer["block_map"]
            assert (drawn["dtype"], drawn["shape"]) == ("uint8", [4, 4, 4])
            octets = torch.frombuffer(bytearray(base64.b64decode(drawn["data"])), dtype=torch.uint8).view(4, 4, 4)
            assert (octets[:, *torch.triu_indices(4, 4, 1)] == 0).all(), "causal"
            assert (octets.diagonal(dim1=1, dim2=2) == 255).all()
            assert mode == "sparse" or set(octets.unique().tolist()) == {0, 255}
    assert "block_map" not in call("/v1/explain", **asked).json()["explanation"]["layers"][0]


def test_images_to_labels_and_embeddings(call: Any) -> None:
    images = [picture(0), f"data:image/jpeg;base64,{picture(1, 'JPEG')}"]
    body = call("/v1/classify", model="vision", images=images).json()
    assert [{row["label"] for row in one["scores"]} for one in body["data"]] == [{"cat", "dog"}] * 2
    assert body["usage"]["tokens"] == 2 * 17
    embedded = call("/v1/embeddings", model="vision-embed", images=images[:1]).json()
    assert len(embedded["data"][0]["embedding"]) == 32


def text_input(texts: list[str]) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}


def hidden(layer: int) -> dict[str, Any]:
    return {"inputs": [text_input(["a"])], "parameters": {"layer": layer}}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (
            "/v1/classify",
            {"model": "vision", "images": ["%%%"]},
            422,
            "image 0: expected base64 (URLs are not fetched)",
        ),
        ("/v1/classify", {"model": "vision", "images": ["https://example.org/a.png"]}, 422, "URLs are not fetched"),
        ("/v1/classify", {"model": "vision", "images": ["AAAA"]}, 422, "image 0"),
        ("/v1/classify", {"model": "vision", "images": []}, 422, "at least one"),
        ("/v1/classify", {"model": "vision", "images": ["AAAA"] * 65}, 413, "65 images"),
        ("/v1/classify", {"model": "vision", "input": "a"}, 422, "takes images"),
        ("/v1/classify", {"model": "classifier", "images": ["AAAA"]}, 422, "takes text, not images"),
        ("/v1/classify", {"model": "classifier"}, 422, "exactly one of input and images"),
        ("/v1/classify", {"model": "decoder", "input": "a"}, 422, "is for score, not for classify"),
        ("/v1/classify", {"model": "classifier", "input": ["a"] * 10_000}, 413, "10000 items"),
        ("/v1/rerank", {"model": "ranker", "query": "a", "documents": []}, 422, "documents"),
        ("/v1/explain", {"model": "decoder", "text": "a", "query": "a" * 300}, 422, "query"),
        (
            "/v1/explain",
            {"model": "decoder", "text": "a", "query": 0, "layers": [3]},
            422,
            "layers: expected -3..2, got 3",
        ),
        ("/v1/score", {"model": "decoder", "source": "a", "target": "b"}, 422, "without source and target"),
        ("/v1/score", {"model": "decoder", "input": ["it"] * 300, "top_k": 100}, 413, "30000 next tokens"),
        ("/v2/models/decoder/infer", hidden(99), 422, "layer: expected -4..3, got 99"),
        ("/v2/models/decoder/infer", {"inputs": [text_input([])]}, 422, "at least one"),
        ("/v1/explain", {"model": "vision", "text": "a", "query": 0}, 422, "not for explain"),
        ("/v1/explain", {"model": "decoder", "text": "tired", "query": "zebra"}, 422, "'zebra' is not in the text"),
        ("/v1/score", {"model": "decoder", "source": "a", "target": "b", "input": "c"}, 422, "either input, or source"),
        ("/v1/score", {"model": "decoder", "input": "a", "truncate": "chunk"}, 422, "is for embeddings"),
        ("/v1/score", {"model": "decoder", "input": "a", "mode": "sparse", "max_error": 0}, 422, "exact answer"),
    ],
)
def test_refusals_say_what_is_wrong(call: Any, path: str, body: dict[str, Any], status: int, message: str) -> None:
    response = call(path, **body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in (error if isinstance(error, str) else error["message"])


def test_strange_texts_are_answered(call: Any) -> None:
    strange = ["", "\x00", "[CLS] [SEP] <|endoftext|>", "\U0001f989" * 50, "e\u0301" * 20, "\u202eabc"]
    body = call("/v1/classify", model="classifier", input=strange).json()
    assert len(body["data"]) == len(strange)


def test_a_layer_each_is_told_on_request(call: Any) -> None:
    ids = torch.randint(10, 128, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    body = call("/v1/score", model="decoder", input=ids, mode="sparse", max_error=1.0, layer_errors=True).json()
    told = body["error"]["layers"]
    assert told["calls"] == len(told["each"]) == 3
    assert told["max_relative_l2_upper"] == max(one["relative_l2_upper"] for one in told["each"])
    assert body["error"]["relative_l2_upper"] == told["max_relative_l2_upper"]
    brief = call("/v1/score", model="decoder", input=ids, mode="sparse", max_error=1.0).json()["error"]["layers"]
    assert "each" not in brief


def test_the_repository_lists_loads_and_unloads(call: Any, engine: Engine) -> None:
    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in call("/v2/repository/index").json()}

    assert set(states().values()) == {"READY"}
    assert call("/v2/repository/models/ranker/unload").status_code == 200
    assert states()["ranker"] == "UNAVAILABLE"
    assert "ranker" not in [row["name"] for row in call("/v2/repository/index", ready=True).json()]
    refused = call("/v1/rerank", model="ranker", query="a", documents=["b"])
    assert (refused.status_code, "unloaded" in refused.json()["error"]["message"]) == (503, True)
    assert call("/readyz", "GET").status_code == 200
    assert call("/v2/repository/models/ranker/load").status_code == 200
    assert call("/v1/rerank", model="ranker", query="a", documents=["b"]).status_code == 200
    broken = call("/v2/repository/models/broken/load")
    assert (broken.status_code, "cannot be loaded" in broken.json()["error"]) == (422, True)
    assert states()["broken"] == "UNAVAILABLE"
    for name in ("nope", "..", "%2e%2e%2f"):
        assert call(f"/v2/repository/models/{name}/load").status_code == 404
    assert call("/readyz", "GET").status_code == 200  # nobody had asked for it at start
    engine.models.load(engine.models.entry("broken").config.model_copy(update={"required": True}))
    not_ready = call("/readyz", "GET")
    assert not_ready.status_code == 503
    assert "model 'broken': " in not_ready.json()["error"]["message"]
    engine.models.unload("broken")
    assert call("/readyz", "GET").status_code == 200


def test_every_path_is_priced(call: Any) -> None:
    requests = {
        "/v1/classify": {"model": "classifier", "input": "a"},
        "/v1/rerank": {"model": "ranker", "query": "a", "documents": ["b"]},
        "/v1/score": {"model": "decoder", "input": "a b"},
        "/v1/explain": {"model": "decoder", "text": "a b", "query": 0},
    }
    for endpoint, body in requests.items():
        estimate = call("/v1/estimate", endpoint=endpoint, request=body).json()
        answered = call(endpoint, **body).json()
        assert estimate[estimate["chosen"]["kind"]]["flops"] == answered["usage"]["flops"]


def infer_body(inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    types = dict.fromkeys(IDS, "INT64") | {"pixel_values": "FP32"}
    listed = []
    for name, value in inputs.items():
        array = np.asarray(value)
        listed.append(
            {
                "name": name,
                "datatype": types.get(name, "BYTES"),
                "shape": list(array.shape),
                "data": array.flatten().tolist(),
            }
        )
    return {"inputs": listed, "parameters": parameters}


def infer(call: Any, model: str, inputs: dict[str, Any], outputs: list[str] | None = None, **parameters: Any) -> Any:
    body = infer_body(inputs, **parameters)
    if outputs:
        body["outputs"] = [{"name": name} for name in outputs]
    response = call(f"/v2/models/{model}/infer", **body)
    assert response.status_code == 200, response.text
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in response.json()["outputs"]}


def test_every_kind_of_model_by_the_open_inference_protocol(call: Any) -> None:
    scores = infer(call, "classifier", {"text": TEXTS})["scores"]
    assert scores.shape == (3, 3)
    ranks = infer(call, "ranker", {"query": ["tired"], "text": TEXTS})["scores"]
    ours = call("/v1/rerank", model="ranker", query="tired", documents=TEXTS).json()["results"]
    assert ranks[:, 0] == pytest.approx([one["relevance_score"] for one in sorted(ours, key=lambda one: one["index"])])
    scored = infer(call, "decoder", {"text": TEXTS})
    assert scored["scored_tokens"].tolist() == [len(zoo.tokenizer().encode(text).ids) - 1 for text in TEXTS]
    given = infer(call, "translator", {"text": TEXTS[:1], "target": TEXTS[1:2]})
    assert given["logprob_sum"].shape == (1,)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    assert infer(call, "vision", {"pixel_values": pixels})["scores"].shape == (2, 2)


def test_hidden_states_of_any_layer_by_the_open_inference_protocol(call: Any, engine: Engine) -> None:
    found = infer(call, "decoder", {"text": TEXTS}, ["hidden_states", "lengths"], layer=1)
    module = engine.models.model("decoder").module
    module.set_attn_implementation("eager")
    try:
        ids = torch.tensor([zoo.tokenizer().encode(TEXTS[0]).ids])
        with torch.no_grad():
            expected = module.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    finally:
        module.set_attn_implementation("farsight")
    assert np.abs(found["hidden_states"][: found["lengths"][0]] - expected.numpy()).max() < 1e-4
    assert found["lengths"].sum() == len(found["hidden_states"])
    assert infer(call, "decoder", {"text": TEXTS}, layer=0).keys() == {"hidden_states", "lengths"}


def test_metadata_names_what_each_model_takes_and_gives(call: Any) -> None:
    document = call("/v2/models/ranker", "GET").json()
    assert [one["name"] for one in document["inputs"]] == ["query", "text", *IDS]
    assert [one["name"] for one in document["outputs"]] == ["scores", "hidden_states", "lengths"]
    info = call("/v1/models/translator", "GET").json()
    assert (info["task"], info["inputs"], info["packed"]) == ("score", "source and target", False)


def test_prompts_are_chosen_by_name_or_by_kind(call: Any) -> None:
    def vector(text: str, **options: Any) -> Any:
        response = call("/v1/embeddings", model="org/embedder", input=text, **options)
        assert response.status_code == 200, response.text
        return np.array(response.json()["data"][0]["embedding"])

    bare = vector("was tired")
    for options, before in (
        ({"prompt_name": "query"}, PROMPTS["query"]),
        ({"input_type": "query"}, PROMPTS["query"]),
        ({"input_type": "document"}, PROMPTS["passage"]),
    ):
        prompted = vector("was tired", **options)
        assert np.abs(prompted - vector(before + "was tired")).max() < 1e-6
        assert np.abs(prompted - bare).max() > 1e-3
    for options, says in (
        ({"prompt_name": "nobody"}, "model 'org/embedder' has query, passage, got 'nobody'"),
        ({"prompt_name": "query", "input_type": "query"}, "at most one of prompt_name and input_type"),
        ({"input_type": "answer"}, "input_type"),
        ({"input": [4, 5], "prompt_name": "query"}, "prompts go before texts"),
    ):
        refused = call("/v1/embeddings", **{"model": "org/embedder", "input": "was tired", **options})
        assert refused.status_code == 422
        assert says in refused.json()["error"]["message"]
    assert call("/v1/models/org/embedder", "GET").json()["prompts"] == ["query", "passage"]


def test_a_name_may_have_a_slash_on_every_route(call: Any) -> None:
    vectors = infer(call, "org/embedder", {"text": TEXTS})["embedding"]
    assert vectors.shape == (3, 32)
    for path in ("org/embedder", "org/embedder/ready", "org/embedder/versions/1", "org/embedder/versions/1/ready"):
        assert call(f"/v2/models/{path}", "GET").status_code == 200
    assert call("/v2/models/org/nobody", "GET").status_code == 404
    assert call("/v1/models/org/nobody", "GET").status_code == 404


def test_what_other_servers_accept_is_accepted(call: Any) -> None:
    """LiteLLM and Dify send a null format, TEI's clients documents with fields of their own."""
    body = call("/v1/embeddings", model="org/embedder", input="it was", encoding_format=None).json()
    assert len(body["data"][0]["embedding"]) == 32
    documents = [{"text": TEXTS[0], "id": 7, "meta": {"a": 1}}, TEXTS[1]]
    ranked = call("/v1/rerank", model="ranker", query="tired", documents=documents, return_documents=True)
    assert {one["document"]["text"] for one in ranked.json()["results"]} == set(TEXTS[:2])
    for head in ("data:image/png;base64,", "DATA:image/png;BASE64,", ""):
        assert call("/v1/classify", model="vision", images=[head + picture(1)]).status_code == 200


def test_token_types_are_what_a_pair_of_texts_has(call: Any) -> None:
    expected = infer(call, "ranker", {"query": ["it was"], "text": [TEXTS[0]]})["scores"]
    pair = zoo.tokenizer(with_pair_types=True).encode("it was", TEXTS[0])
    inputs = {"input_ids": np.array([pair.ids]), "token_type_ids": np.array([pair.type_ids])}
    assert np.abs(infer(call, "ranker", inputs)["scores"] - expected).max() < 1e-5
    padded = {name: np.pad(ids, ((0, 0), (0, 3))) for name, ids in inputs.items()}
    padded["attention_mask"] = np.array([[1] * len(pair.ids) + [0] * 3])
    assert np.abs(infer(call, "ranker", padded)["scores"] - expected).max() < 1e-5
    refusals = (
        ({"input_ids": inputs["input_ids"]}, "send texts, or token_type_ids"),
        ({**inputs, "token_type_ids": inputs["token_type_ids"] + 2}, "expected token types 0..1, got 2..3"),
        ({**inputs, "token_type_ids": inputs["token_type_ids"][:, 1:]}, "as input_ids"),
    )
    for wrong, says in refusals:
        response = call("/v2/models/ranker/infer", **infer_body(wrong))
        assert response.status_code == 422
        assert says in response.json()["error"]
