"""Audio and files of forms over HTTP and the open inference protocol, in process: a small Whisper behind the engine."""

from __future__ import annotations

import base64
import gc
import json
import struct
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import transformers as hf
from prometheus_client import CollectorRegistry

from service.api.http.app import create_app
from service.api.http.multipart import MAX_FILE_BYTES, MAX_PARTS, parse_form
from service.config import Config, ModelConfig
from service.engine.engine import Engine
from service.models.inputs import audio
from service.telemetry.metrics import Metrics
from tests.api.common import caller
from tests.api.test_text import picture
from tests.models import zoo
from tests.models.test_audio import RATE, encoded, sound

FILE = encoded(sound(1.5))
TEXT = base64.b64encode(FILE).decode()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("models")
    zoo.save("whisper", hf.AutoModel, root / "whisper")
    zoo.save("vit", hf.AutoModel, root / "vision")
    zoo.save("bert", hf.AutoModel, root / "bert")
    models = tuple(ModelConfig(name=one.name, path=str(one)) for one in sorted(root.iterdir()))
    engine = Engine.start(Config(models=models, max_json_bytes=4 << 20), Metrics(CollectorRegistry()))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def send(engine: Engine) -> Any:
    call = caller(create_app(engine))
    return lambda path, method="POST", **arguments: call(method, path, **arguments)


def embed(send: Any, **body: Any) -> Any:
    response = send("/v1/embeddings", json={"model": "whisper", **body})
    assert response.status_code == 200, response.text
    return response.json()


def form(send: Any, files: list[tuple[str, bytes]], **fields: str) -> httpx.Response:
    parts = [(name, ("file", data)) for name, data in files]
    response: httpx.Response = send("/v1/embeddings", data={"model": "whisper", **fields}, files=parts)
    return response


def test_base64_data_urls_and_forms_are_the_same(send: Any) -> None:
    body = embed(send, audio=[TEXT, f"data:audio/wav;base64,{TEXT}"])
    first, second = (one["embedding"] for one in body["data"])
    assert first == pytest.approx(second, abs=1e-6)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert body["usage"]["total_tokens"] == 200  # windows are computed whole
    posted = form(send, [("audio", FILE)], encoding_format="float", truncate="end").json()
    assert posted["data"][0]["embedding"] == pytest.approx(first, abs=1e-6)
    cut = form(send, [("audio", FILE), ("audio", FILE)], dimensions="8").json()
    assert [len(one["embedding"]) for one in cut["data"]] == [8, 8]


def test_long_audio_is_refused_cut_or_read_window_by_window(send: Any) -> None:
    long = base64.b64encode(encoded(sound(3.0))).decode()
    refused = send("/v1/embeddings", json={"model": "whisper", "audio": [long]})
    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("audio 0: expected at most 2 s, got 3.0 s")
    usage = embed(send, audio=[long], truncate="end")["usage"]
    assert (usage["tokens"], usage["truncated"], usage["dropped_tokens"]) == (100, 1, 50)
    assert embed(send, audio=[long], truncate="chunk")["usage"]["tokens"] == 200


def test_decoding_ends_with_its_request(send: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, whole = [], audio._Stream.read

    def slow(*arguments: Any, **options: Any) -> Any:
        read.append(1)
        time.sleep(0.05)
        return whole(*arguments, **options)

    monkeypatch.setattr(audio._Stream, "read", slow)
    long = base64.b64encode(encoded(np.zeros(110 * RATE, np.float32), kind="FLAC")).decode()  # 27 blocks
    body = {"model": "whisper", "audio": [long], "truncate": "chunk", "timeout_s": 0.15}
    assert send("/v1/embeddings", json=body).status_code == 504
    time.sleep(0.2)
    stopped_after = len(read)
    assert stopped_after < 15
    time.sleep(0.2)
    assert len(read) == stopped_after


def test_the_limit_of_a_form_is_that_of_audio() -> None:
    assert MAX_FILE_BYTES == audio.MAX_BYTES


def test_the_price_is_known_before(send: Any) -> None:
    body = {"model": "whisper", "audio": [TEXT]}
    estimate = send("/v1/estimate", json={"endpoint": "/v1/embeddings", "request": body}).json()
    answered = embed(send, audio=[TEXT])
    assert estimate[estimate["chosen"]["kind"]]["flops"] == answered["usage"]["flops"] > 0


def test_one_file_needs_no_list(send: Any) -> None:
    alone, listed = (embed(send, audio=given)["data"] for given in (TEXT, [TEXT]))
    assert len(alone) == len(listed) == 1
    assert alone[0]["embedding"] == pytest.approx(listed[0]["embedding"], abs=1e-6)


def test_likely_mistakes_are_answered_with_what_to_do(send: Any) -> None:
    content = WHISPER + part("audio", "hello.wav") + b"--x--"
    named = send("/v1/embeddings", content=content, headers=BOUNDARY).json()["error"]["message"]
    assert named.endswith("or in a form a file: audio=@FILE")
    raw = send("/v1/embeddings", content=FILE, headers={"content-type": "audio/wav"})
    assert (raw.status_code, "or multipart/form-data, got 'audio/wav'" in raw.text) == (415, True)
    inputs = [{"name": "audio", "datatype": "BYTES", "shape": [1], "data": [TEXT]}]
    encoded_twice = send("/v2/models/whisper/infer", json={"inputs": inputs}).json()["error"]
    assert encoded_twice.endswith("this is base64 of one, expected its bytes")
    unknown = send("/v1/embeddings", json={"model": "whisper", "audios": [TEXT]}).json()["error"]["message"]
    assert unknown.startswith("audios: unknown field; expected truncate, ")
    assert ", images, audio, " in unknown


def test_images_come_in_forms_too(send: Any) -> None:
    file = picture(0)
    given = embed(send, model="vision", images=[file])["data"][0]["embedding"]
    posted = form(send, [("images", base64.b64decode(file))], model="vision").json()
    assert posted["data"][0]["embedding"] == pytest.approx(given, abs=1e-6)


def test_the_open_inference_protocol(send: Any, engine: Engine) -> None:
    described = send("/v2/models/whisper", "GET").json()
    assert [(one["name"], one["datatype"]) for one in described["inputs"]] == [
        ("audio", "BYTES"),
        ("input_features", "FP32"),
    ]
    processor = engine.models.model("whisper").inputs.spec.audio_processor
    assert processor is not None
    features = processor.windows(0, FILE, "error", 1)[0][0].features.numpy()[None]
    inputs = [{"name": "input_features", "datatype": "FP32", "shape": list(features.shape), "data": features.tolist()}]
    outputs = [{"name": "hidden_states"}, {"name": "lengths"}]
    found = send("/v2/models/whisper/infer", json={"inputs": inputs, "outputs": outputs})
    assert found.status_code == 200, found.text
    states, lengths = found.json()["outputs"]
    assert (states["shape"], lengths["data"]) == ([100, 32], [100])
    inputs = [{"name": "input_features", "datatype": "FP32", "shape": [16, 200], "data": features[0].tolist()}]
    refused = send("/v2/models/whisper/infer", json={"inputs": inputs})
    assert (refused.status_code, refused.json()["error"]) == (
        422,
        "input_features: expected [n, 16, 200], got [16, 200]",
    )
    inputs = [{"name": "audio", "datatype": "BYTES", "shape": [1], "data": ["not audio"]}]
    refused = send("/v2/models/whisper/infer", json={"inputs": inputs})
    assert (refused.status_code, refused.json()["error"]) == (422, "audio 0: expected a WAV or FLAC file")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "whisper", "input": "a"}, "takes audio, not text"),
        ({"model": "whisper", "images": ["AAAA"]}, "takes audio, not images"),
        ({"model": "vision", "audio": [TEXT]}, "takes images, not audio"),
        ({"model": "bert", "audio": [TEXT]}, "takes text, not audio"),
        ({"model": "whisper", "audio": []}, "audio: expected at least one"),
        ({"model": "whisper", "audio": ["%%%"]}, "audio 0: expected base64"),
        ({"model": "whisper", "audio": ["é"]}, "audio 0: expected base64"),
        ({"model": "whisper", "audio": ["https://example.org/a.wav"]}, "URLs are not fetched"),
        ({"model": "whisper", "audio": [TEXT], "input": "a"}, "exactly one of input, images and audio"),
        ({"model": "whisper", "audio": [TEXT], "prompt_name": "query"}, "prompts go before texts"),
        ({"model": "whisper"}, "exactly one of input, images and audio"),
    ],
)
def test_refused_bodies(send: Any, body: dict[str, Any], message: str) -> None:
    response = send("/v1/embeddings", json=body)
    assert response.status_code == 422
    assert message in response.json()["error"]["message"]


def test_other_tasks_of_an_audio_model_are_refused(send: Any) -> None:
    for path, body in (("score", {"input": "a"}), ("explain", {"text": "a", "query": 0}), ("classify", {"input": "a"})):
        response = send(f"/v1/{path}", json={"model": "whisper", **body})
        assert (response.status_code, response.json()["error"]["code"]) == (422, "wrong_task")


BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}


def part(name: str, text: str) -> bytes:
    return f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()


WHISPER = part("model", "whisper")
NAMELESS = b"--x\r\ncontent-disposition: form-data; filename=secret\r\n\r\na\r\n"
LARGE = part("audio", "").replace(b"form-data;", b'form-data; filename="a";')[:-2] + bytes(MAX_FILE_BYTES + 1) + b"\r\n"
ENCODED = (
    part("audio", "YQ==")
    .replace(b"form-data;", b'form-data; filename="a";')
    .replace(b"\r\n\r\n", b"\r\ncontent-transfer-encoding: secret\r\n\r\n")
)


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"", BOUNDARY, 400, "no closing boundary"),
        (part("model", "whisper") + part("dimensions", "8"), BOUNDARY, 400, "no closing boundary"),
        (b"--x--", {"content-type": "multipart/form-data; boundary=" + 300 * "b"}, 400, "malformed"),
        (WHISPER + part('a"; secret="s', "") + b"--x--", BOUNDARY, 422, "a"),
        (WHISPER + NAMELESS + b"--x--", BOUNDARY, 400, "a part has no name"),
        (WHISPER + ENCODED + b"--x--", BOUNDARY, 400, "audio: expected no content-transfer-encoding"),
        (WHISPER + part("a" * 600, "") + b"--x--", BOUNDARY, 400, "malformed"),
        (b"not a form", BOUNDARY, 400, "multipart/form-data"),
        (part("model", "whisper"), {"content-type": "multipart/form-data"}, 400, "with a boundary"),
        (part("model", "a") + part("model", "b") + b"--x--", BOUNDARY, 400, "model: is given twice"),
        (
            part("model", "a").replace(b"\r\na\r\n", b"\r\n\xff\r\n") + b"--x--",
            BOUNDARY,
            400,
            "model is not valid UTF-8",
        ),
        (WHISPER + part("unknown", "a") + b"--x--", BOUNDARY, 422, "unknown: unknown field"),
        (b"".join(part(f"a{at}", "") for at in range(MAX_PARTS + 1)) + b"--x--", BOUNDARY, 413, "257 parts"),
        (WHISPER + LARGE + b"--x--", BOUNDARY, 413, "audio: a file: "),
        (part("input", "a" * ((4 << 20) + 1)) + b"--x--", BOUNDARY, 413, "fields of a multipart body"),
        (WHISPER + part("audio", "a text, not a file") + b"--x--", BOUNDARY, 422, "audio=@FILE"),
    ],
)
def test_damaged_and_oversized_forms(
    send: Any, content: bytes, kind: Any, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = send("/v1/embeddings", content=content, headers=kind)
    assert "secret" not in response.text + caplog.text
    assert (response.status_code, message in response.json()["error"]["message"]) == (status, True), response.text


def test_a_form_leaves_no_memory_behind() -> None:
    """Without the collector of cycles, which may come late."""
    body = WHISPER + LARGE[: 8 << 20] + b"\r\n--x--"
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            assert len(parse_form(body, BOUNDARY["content-type"], 1000)["audio"][0]) > 8_000_000
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 1_000_000
    assert peak < 3.5 * len(body)


def test_other_endpoints_take_no_forms(send: Any) -> None:
    for path in ("rerank", "score", "explain"):
        assert send(f"/v1/{path}", content=WHISPER + b"--x--", headers=BOUNDARY).status_code == 415


def test_audio_by_the_binary_extension(send: Any) -> None:
    raw = struct.pack("<I", len(FILE)) + FILE
    given = {"name": "audio", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [given]}).encode()
    length = {"inference-header-content-length": str(len(head))}
    response = send("/v2/models/whisper/infer", content=head + raw, headers=length)
    assert response.status_code == 200, response.text
    expected = embed(send, audio=[TEXT])["data"][0]["embedding"]
    assert response.json()["outputs"][0]["data"] == pytest.approx(expected, abs=1e-6)


def test_a_form_tells_its_price_first(send: Any) -> None:
    posted = send(
        "/v1/embeddings", data={"model": "whisper"}, files=[("audio", ("a", FILE))], headers={"x-dry-run": "true"}
    )
    estimate = posted.json()
    assert estimate[estimate["chosen"]["kind"]]["flops"] > 0


def test_the_openapi_text_names_files(send: Any) -> None:
    content = send("/openapi.json", "GET").json()["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    fields = content["multipart/form-data"]["schema"]["properties"]
    assert fields["audio"] == fields["images"] == {"type": "array", "items": {"type": "string", "format": "binary"}}
