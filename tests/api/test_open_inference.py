"""The Open Inference Protocol without a server: bodies as tritonclient 2.73 writes and reads them, and errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api import answer as answers
from service.api.open_inference import http_body as oip_http
from service.api.open_inference import metadata, parameters
from service.api.open_inference import protocol as oip
from service.api.open_inference.inputs import InferInput
from service.api.open_inference.protocol import InferRequest
from service.api.open_inference.tensors import DATATYPES
from service.core.answer import (
    Answer,
    ErrorReport,
    Timing,
    Usage,
)
from service.core.options import (
    AttentionOptions,
    EmbedOptions,
    Priority,
    ScoreOptions,
)
from service.core.plan import Cost, Plan, PlanKind
from service.core.request import AttentionRequest, ForwardRequest, Request
from service.errors import FarsightError, Kind
from tests.api.common import INFO

SAMPLE = torch.arange(8.0).reshape(1, 1, 2, 4)


def answer(tensors: dict[str, torch.Tensor]) -> Answer:
    return Answer(
        "req-1",
        tensors,
        Plan(PlanKind.DENSE, Cost(1, 2, 3, 4), 0.5, "short"),
        ErrorReport(),
        Usage(2, 3, 3, 4, 4, 0.25, 5, 1e-6, 0.0),
        Timing(0.125, 0.25, 0.5),
    )


def attention(parameters: dict[str, Any] | None = None, outputs: dict[str, bool | None] | None = None) -> InferRequest:
    inputs = tuple(InferInput(name, "FP32", tuple(SAMPLE.shape), SAMPLE) for name in ("query", "key", "value"))
    return InferRequest("attention", "", "", inputs, parameters or {}, outputs or {})


def embed(*inputs: InferInput, **parameters: Any) -> InferRequest:
    return InferRequest("mini", "1", "", inputs, parameters)


def tensor(name: str, value: torch.Tensor) -> InferInput:
    return InferInput(name, DATATYPES[value.dtype], tuple(value.shape), value)


def text(*strings: bytes, shape: tuple[int, ...] | None = None) -> InferInput:
    return InferInput("text", "BYTES", shape or (len(strings),), list(strings))


def parse(infer: InferRequest, **more: Any) -> Request:
    return oip.parse_infer(infer, [INFO], request_id="req-1", **more)


def options(parameters: dict[str, Any], **more: Any) -> AttentionOptions:
    request = parse(attention(parameters), **more)
    assert isinstance(request, AttentionRequest)
    return request.options


def refused(call: Callable[[], object], says: str, kind: Kind = Kind.INVALID) -> FarsightError:
    with pytest.raises(FarsightError, match=says) as caught:
        call()
    assert caught.value.kind == kind
    return caught.value


# models and metadata


def test_an_unknown_model_error_names_the_served_ones() -> None:
    error = refused(
        lambda: metadata.find_model("bert", "", [INFO]), "'bert' is not served; expected one of attention, mini", NF
    )
    assert error.param == "model"


NF = Kind.NOT_FOUND


@pytest.mark.parametrize("name", ["attention", "mini"])
def test_versions(name: str) -> None:
    for version in ("", "1"):
        metadata.find_model(name, version, [INFO])
    refused(lambda: metadata.find_model(name, "2", [INFO]), "expected version '1', got '2'", NF)


def test_metadata() -> None:
    assert metadata.server_metadata()["name"] == "farsight"
    assert metadata.server_metadata()["extensions"] == ["binary_tensor_data"]
    document = metadata.model_metadata("attention", "", [INFO])
    assert document["inputs"][0] == {"name": "query", "datatype": "FP32", "shape": [-1, -1, -1, -1]}
    assert [output["name"] for output in document["outputs"]] == [
        "output",
        "lse",
        "weights",
        "top_weights",
        "top_indices",
        "block_map",
    ]
    document = metadata.model_metadata("mini", "", [INFO])
    assert document["versions"] == ["1"]
    assert document["platform"] == "farsight_torch"
    assert document["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
    assert document["outputs"] == [
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "hidden_states", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "lengths", "datatype": "INT64", "shape": [-1]},
    ]


# parameters


def test_list_options_are_those_with_tuples() -> None:
    listed = {
        name
        for options in (AttentionOptions, ScoreOptions)
        for name, field in options.model_fields.items()
        if any(get_origin(part) is tuple for part in (field.annotation, *getattr(field.annotation, "__args__", ())))
    }
    assert listed == parameters._LIST_OPTIONS


def test_options_by_json_and_by_strings_are_the_same() -> None:
    as_json = {"window": [-1, 0], "returns": ["lse"], "rows": [0, 1], "kv_lengths": [2], "causal_alignment": 1}
    as_text = {"window": "[-1, 0]", "returns": '["lse"]', "rows": "[0,1]", "kv_lengths": "[2]", "causal_alignment": "1"}
    assert options(as_json) == options(as_text)
    assert options(as_json).window == (-1, 0)
    assert options({"max_error": 0, "scale": 1, "causal_alignment": "top_left", "is_causal": True}).max_error == 0.0


@pytest.mark.parametrize(
    ("parameters", "param", "says"),
    [
        ({"mod": "dense"}, "mod", "unknown parameter 'mod'; expected one of is_causal"),
        ({"mode": "fast"}, "mode", "mode: Input should be 'auto'"),
        ({"max_error": 2}, "max_error", "max_error: "),
        ({"window": "[-1"}, "window", "window: expected a list, or a list as JSON text"),
        ({"window": "[-2, 0]"}, "window", "window.0: "),
        ({"window": 5}, "window", "window: "),
        ({"returns": "[]"}, "returns", "returns: "),
        ({"timeout_s": 0}, "timeout_s", "timeout_s: "),
        ({"timeout": -1}, "timeout", "microseconds"),
        ({"timeout": "1"}, "timeout", "microseconds"),
        ({"priority": -1}, "priority", "priority: "),
        ({"priority": True}, "priority", "priority: "),
        ({"priority": "high"}, "priority", "priority: "),
        ({"sequence_id": 7}, "sequence_id", "sequences are not supported"),
        ({"stage": "logits"}, "stage", "stage: Input should be 'raw', 'capped', 'masked' or 'softmax'"),
        ({"stage": "raw"}, "stage", "stage: raw is a stage of weights or top_weights"),
        ({"audit_rows": 100}, "audit_rows", "audit_rows: Input should be 59 or 459"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, Any], param: str, says: str) -> None:
    assert refused(lambda: options(parameters), says).param == param


def test_a_refusal_does_not_repeat_the_value() -> None:
    assert "secret" not in refused(lambda: options({"mode": "secret"}), "mode").message


def test_parameters_of_stock_clients_are_ignored() -> None:
    plain = {
        "binary_data_output": True,
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "scale": None,
    }
    assert options({**plain, "priority": 0, "timeout": 0}) == AttentionOptions()


def test_priority_and_timeout_of_triton() -> None:
    assert options({"priority": 1}).priority is Priority.INTERACTIVE
    assert options({"priority": 2}).priority is Priority.BATCH
    assert options({"priority": "batch"}).priority is Priority.BATCH
    assert options({"timeout": 1_500_000}).timeout_s == 1.5


def test_the_shortest_timeout_counts() -> None:
    assert options({"timeout_s": 3, "timeout": 2_000_000}, timeout_s=1.0).timeout_s == 1.0
    assert options({"timeout_s": 3, "timeout": 2_000_000}).timeout_s == 2.0
    assert options({}, timeout_s=1.0).timeout_s == 1.0
    request = parse(embed(text(b"a"), timeout_s=3), timeout_s=5.0)
    assert isinstance(request, ForwardRequest)
    assert request.options.timeout_s == 3.0


# attention


def test_returns_follow_the_requested_outputs() -> None:
    def returns(parameters: dict[str, Any], *outputs: str) -> tuple[str, ...]:
        request = parse(attention(parameters, dict.fromkeys(outputs)))
        assert isinstance(request, AttentionRequest)
        return request.options.returns

    assert returns({}) == ("output",)
    assert returns({}, "lse") == ("lse",)
    assert returns({}, "top_indices", "top_weights") == ("top_weights",)
    assert returns({"returns": ["lse"]}, "output") == ("lse", "output")
    assert returns({}, "block_map") == ("block_map",)
    assert returns({"returns": '["lse", "weights"]'}) == ("lse", "weights")


def test_a_stage_goes_with_the_weights_however_they_are_asked_for() -> None:
    for infer in (
        attention({"stage": "raw"}, {"weights": None}),
        attention({"stage": "raw"}, {"output": None, "top_indices": None}),
        attention({"stage": "raw", "returns": '["top_weights"]'}),
    ):
        request = parse(infer)
        assert isinstance(request, AttentionRequest)
        assert request.options.stage == "raw"
    refused(lambda: parse(attention({"stage": "raw"}, {"lse": None})), "stage: raw is a stage of weights")
    assert options({"stage": "softmax"}) == options({})


def test_audit_rows() -> None:
    assert options({}).audit_rows is None
    assert options({"audit_rows": 459}).audit_rows == 459


def test_rank_three_comes_and_goes_without_a_batch_axis() -> None:
    inputs = [tensor(name, SAMPLE[0]) for name in ("query", "key", "value")]
    mask = tensor("attn_mask", torch.ones(1, 2, 2, dtype=torch.bool))
    infer = InferRequest("attention", "", "", (*inputs, mask), {}, {"output": None, "lse": None})
    request = parse(infer, tenant="a")
    assert isinstance(request, AttentionRequest)
    assert (request.rank, request.id, request.tenant) == (3, "req-1", "a")
    assert request.query.shape == (1, 1, 2, 4)
    assert request.attn_mask is not None
    assert request.attn_mask.shape == (1, 1, 2, 2)
    sent = oip.outputs(answer({"output": SAMPLE, "lse": torch.zeros(1, 1, 2)}), request)
    assert {name: list(tensor.shape) for name, tensor in sent.items()} == {"output": [1, 2, 4], "lse": [1, 2]}


def test_only_wanted_tensors_are_sent() -> None:
    request = parse(attention(outputs={"top_indices": None}))
    top = {"top_weights": SAMPLE, "top_indices": SAMPLE.long()}
    assert list(oip.outputs(answer({"output": SAMPLE, **top}), request)) == ["top_weights", "top_indices"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda inputs: inputs[:2], "input 'value' is missing"),
        (lambda inputs: (*inputs, inputs[0]), "input 'query' is given twice"),
        (
            lambda inputs: (*inputs, tensor("bias", SAMPLE)),
            "unknown input 'bias' of 'attention'; expected one of query, key",
        ),
        (
            lambda inputs: (*inputs, InferInput("attn_mask", "BYTES", (1,), [b""])),
            "attn_mask: expected a datatype of numbers, got BYTES",
        ),
        (lambda inputs: (*inputs[:2], tensor("value", SAMPLE[0])), "value: expected"),
    ],
)
def test_wrong_inputs(change: Callable[[Any], Any], says: str) -> None:
    infer = InferRequest("attention", "", "", change(attention().inputs), {})
    refused(lambda: parse(infer), says)


def test_an_unknown_output_error_names_the_known_ones() -> None:
    refused(
        lambda: parse(attention(outputs={"out": None})),
        "unknown output 'out' of 'attention'; expected one of output, lse",
    )


# embeddings


def test_texts() -> None:
    for texts in (text(b"a", "é".encode()), text(b"a", "é".encode(), shape=(2, 1))):
        request = parse(embed(texts, truncate="end", dimensions=2, priority=3))
        assert request == ForwardRequest(
            "req-1",
            "mini",
            "embed",
            EmbedOptions(truncate="end", dimensions=2, priority=Priority.BATCH),
            texts=("a", "é"),
            endpoint="infer",
        )


def test_ids_are_cut_to_the_valid_ones() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1]])
    for typed in (mask, mask.bool(), mask.int()):
        request = parse(embed(tensor("input_ids", ids), tensor("attention_mask", typed)))
        assert isinstance(request, ForwardRequest)
        assert request.token_ids == ((1, 2), (6,), (7, 8, 9))
    request = parse(embed(tensor("input_ids", ids.int())))
    assert isinstance(request, ForwardRequest)
    assert request.token_ids == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


IDS = tensor("input_ids", torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("infer", "says"),
    [
        (embed(), "inputs: expected exactly one of 'text' and 'input_ids', got none"),
        (embed(text(b"a"), IDS), "exactly one of 'text' and 'input_ids', got 'text' and 'input_ids'"),
        (embed(text(b"a"), tensor("attention_mask", torch.ones(1, 1))), "belongs to 'input_ids'"),
        (embed(tensor("text", SAMPLE)), "text: expected datatype BYTES, got FP32"),
        (embed(text(b"a", b"b", shape=(1, 2))), r"text: expected shape \[n\] or \[n, 1\], got \[1, 2\]"),
        (embed(text(b"\xff")), "not valid UTF-8"),
        (embed(tensor("input_ids", torch.tensor([1, 2]))), r"expected INT64 \[n, L\], got INT64 \[2\]"),
        (embed(tensor("input_ids", SAMPLE[0, 0])), "expected INT64"),
        (embed(IDS, tensor("attention_mask", torch.tensor([[1, 0, 1]]))), "ones and then zeros"),
        (embed(IDS, tensor("attention_mask", torch.tensor([[2, 2, 2]]))), "ones and then zeros"),
        (embed(IDS, tensor("attention_mask", torch.tensor([[0, 0, 0]]))), "expected at least one valid id in each row"),
        (embed(IDS, tensor("attention_mask", torch.tensor([[1, 1]]))), r"expected INT64 or BOOL \[1, 3\]"),
        (embed(IDS, tensor("attention_mask", torch.ones(1, 3))), "expected INT64 or BOOL"),
        (
            embed(tensor("input_ids", torch.empty(1, 0, dtype=torch.int64))),
            "expected at least one valid id in each row",
        ),
        (embed(text(b"a"), is_causal=True), "unknown parameter 'is_causal'; expected one of truncate"),
        (embed(text(b"a"), dimensions=0), "dimensions: "),
        (
            InferRequest("mini", "", "", (text(b"a"),), {}, {"logits": None}),
            "unknown output 'logits' of 'mini'; expected one of embedding",
        ),
    ],
)
def test_wrong_embed_requests(infer: InferRequest, says: str) -> None:
    refused(lambda: parse(infer), says)


# HTTP: bodies as tritonclient.http 2.73 generates them

BINARY = (
    '{"inputs":[{"name":"query","shape":[1,1,2,4],"datatype":"FP32","parameters":{"binary_data_size":32}},'
    '{"name":"key","shape":[1,1,2,4],"datatype":"FP32","parameters":{"binary_data_size":32}},'
    '{"name":"value","shape":[1,1,2,4],"datatype":"FP32","parameters":{"binary_data_size":32}}],'
    '"parameters":{"binary_data_output":true}}'
)
MIXED = (
    '{"inputs":[{"name":"query","shape":[1,1,2,4],"datatype":"FP32","parameters":{"binary_data_size":32}},'
    '{"name":"key","shape":[1,1,2,4],"datatype":"FP32","data":[0.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0]},'
    '{"name":"value","shape":[1,1,2,4],"datatype":"FP32","parameters":{"binary_data_size":32}}],'
    '"outputs":[{"name":"output","parameters":{"binary_data":true}},{"name":"lse","parameters":{"binary_data":false}}],'
    '"parameters":{"priority":2,"timeout":1500000,"is_causal":true,"window":"[-1, 0]","max_error":0}}'
)
TEXT = (
    '{"inputs":[{"name":"text","shape":[2],"datatype":"BYTES","parameters":{"binary_data_size":19}}],'
    '"parameters":{"binary_data_output":true}}'
)
TEXT_JSON = (
    '{"inputs":[{"name":"text","shape":[2,1],"datatype":"BYTES","data":["hello","w\\u00F6rld"]}],'
    '"parameters":{"binary_data_output":true}}'
)
RAW = struct.pack("<8f", *range(8))


def http(head: str, raw: bytes = b"", model: str = "attention") -> InferRequest:
    return oip_http.parse_http(head.encode() + raw, len(head) if raw else None, model=model)


@pytest.mark.parametrize("make", [bytes, bytearray])
def test_a_binary_body(make: Any) -> None:
    body = make(BINARY.encode() + RAW * 3)
    infer = oip_http.parse_http(body, len(BINARY), model="attention", model_version="1")
    request = parse(infer)
    assert isinstance(request, AttentionRequest)
    assert all(torch.equal(given, SAMPLE) for given in (request.query, request.key, request.value))
    assert infer.is_binary("output")


def test_binary_and_json_inputs_in_one_body() -> None:
    infer = http(MIXED, RAW * 2)
    request = parse(infer)
    assert isinstance(request, AttentionRequest)
    assert torch.equal(request.key, SAMPLE)
    assert request.options.returns == ("output", "lse")
    assert request.options.window == (-1, 0)
    assert request.options.timeout_s == 1.5
    assert (infer.is_binary("output"), infer.is_binary("lse")) == (True, False)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_sixteen_bit_floats(datatype: str) -> None:
    head = BINARY.replace("FP32", datatype).replace("32}", "16}")
    half = SAMPLE.to(torch.float16 if datatype == "FP16" else torch.bfloat16)
    raw = half.view(torch.uint8).numpy().tobytes()
    infer = http(head, raw * 3)
    request = parse(infer)
    assert isinstance(request, AttentionRequest)
    assert torch.equal(request.query, half)
    body, length = rendered(answer({"output": half}), request, infer)
    assert length is not None
    assert json.loads(body[:length])["outputs"][0]["datatype"] == datatype
    assert body[length:] == raw
    as_json, _ = rendered(
        answer({"output": half}), request, http(MIXED.replace('y_data":true', 'y_data":false'), RAW * 2)
    )
    assert json.loads(as_json)["outputs"][0] == {
        "name": "output",
        "datatype": "FP32",
        "shape": [1, 1, 2, 4],
        "data": SAMPLE.flatten().tolist(),
    }


def test_texts_over_http() -> None:
    raw = b"\x05\0\0\0hello\x06\0\0\0w\xc3\xb6rld"
    for infer in (http(TEXT, raw, "mini"), http(TEXT_JSON, model="mini")):
        request = parse(infer)
        assert isinstance(request, ForwardRequest)
        assert request.texts == ("hello", "wörld")


def rendered(*arguments: Any) -> tuple[bytes, int | None]:
    """The whole body."""
    body, length = oip_http.render_http(*arguments)
    return body if isinstance(body, bytes) else b"".join(body), length


def read_as_tritonclient(body: bytes, length: int | None) -> dict[str, np.ndarray[Any, Any]]:
    """What tritonclient.http.InferResult does with a body."""
    head = json.loads(body[:length])
    raw, at, found = body[length:] if length is not None else b"", 0, {}
    dtypes = {"FP32": np.float32, "INT64": np.int64}
    for entry in head["outputs"]:
        dtype = dtypes[entry["datatype"]]
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(entry["data"], dtype=dtype)
        else:
            array = np.frombuffer(raw[at : at + size], dtype=dtype)
            at += size
        found[entry["name"]] = array.reshape(entry["shape"])
    assert at == len(raw)
    return found


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_an_answer_reads_the_same_in_every_form(flags: tuple[bool, bool]) -> None:
    infer = attention(outputs={"output": flags[0], "top_weights": flags[1]})
    request = parse(infer)
    tensors = {"output": torch.randn(1, 1, 2, 4), "top_weights": torch.rand(1, 1, 2, 3)}
    tensors["top_indices"] = torch.tensor([[[[0, 1, 2], [2, 1, 0]]]])
    body, length = rendered(answer(tensors), request, infer)
    assert (length is None) == (flags == (False, False))
    found = read_as_tritonclient(body, length)
    assert list(found) == list(tensors)
    assert all(np.array_equal(found[name], sent.numpy()) for name, sent in tensors.items())
    head = json.loads(body[:length])
    assert (head["model_name"], head["model_version"]) == ("attention", "1")
    assert head["parameters"] == answers.headers(answer(tensors))
    assert "id" not in head


def test_the_id_is_echoed() -> None:
    infer = http(BINARY.replace('{"inputs"', '{"id":"r1","inputs"'), RAW * 3)
    body, length = rendered(answer({"output": SAMPLE}), parse(infer), infer)
    assert json.loads(body[:length])["id"] == "r1"


def test_an_infinite_value_is_null_in_json() -> None:
    infer = attention(outputs={"lse": None})
    body, _ = rendered(answer({"lse": torch.tensor([[[0.5, -torch.inf]]])}), parse(infer), infer)
    assert json.loads(body)["outputs"][0]["data"] == [0.5, None]


@pytest.mark.parametrize(
    ("head", "raw", "kind", "says"),
    [
        ("{", b"", Kind.MALFORMED, "cannot be parsed"),
        ("[1]", b"", Kind.INVALID, "Input should be"),
        ('{"inputs":[]}', b"", Kind.INVALID, "inputs: "),
        (BINARY, RAW * 2, Kind.MALFORMED, "value: expected 32 binary bytes, got 0"),
        (BINARY, RAW * 4, Kind.MALFORMED, "inputs: expected 96 binary bytes, got 128"),
        (BINARY.replace("[1,1,2,4]", "[1,1,2,5]"), RAW * 3, Kind.INVALID, "takes 40 bytes, got 32"),
        (BINARY.replace("[1,1,2,4]", "[1,1,-2,4]"), RAW * 3, Kind.INVALID, "negative dimension"),
        (BINARY.replace("[1,1,2,4]", "[1,1,2.5,4]"), RAW * 3, Kind.INVALID, "inputs.0.shape.2"),
        (BINARY.replace(':{"binary_data_size":32}', ":{}"), RAW * 3, Kind.INVALID, "exactly one of data and binary"),
        (
            BINARY.replace('_size":32', '_size":-32'),
            RAW * 3,
            Kind.INVALID,
            "binary_data_size: expected a number of bytes",
        ),
        (
            BINARY.replace('_size":32', '_size":true'),
            RAW * 3,
            Kind.INVALID,
            "binary_data_size: expected a number of bytes",
        ),
        (
            BINARY.replace("binary_data_size", "shared_memory_region"),
            RAW,
            Kind.INVALID,
            "unknown parameter 'shared_memory_region'",
        ),
        (BINARY.replace('_output":true', '_output":1'), RAW * 3, Kind.INVALID, "binary_data_output: expected true"),
        (MIXED.replace('"lse"', '"output"'), RAW * 2, Kind.INVALID, "'output' is requested twice"),
        (
            MIXED.replace('"binary_data":true', '"classification":3'),
            RAW * 2,
            Kind.INVALID,
            "unknown parameter 'classification'",
        ),
        (
            MIXED.replace('"datatype":"FP32","data"', '"datatype":"BF16","data"'),
            RAW * 2,
            Kind.INVALID,
            "BF16 has no form",
        ),
        (BINARY.replace('{"inputs"', '{"model":"x","inputs"'), RAW * 3, Kind.INVALID, "model: "),
    ],
)
def test_wrong_bodies(head: str, raw: bytes, kind: Kind, says: str) -> None:
    refused(lambda: http(head, raw), says, kind)


@pytest.mark.parametrize("length", [-1, 0, 10**9])
def test_a_header_length_outside_of_the_body(length: int) -> None:
    refused(
        lambda: oip_http.parse_http(b"{}", length, model="attention"),
        f"expected 1 to 2 bytes, got {length}",
        Kind.MALFORMED,
    )


def test_too_much_json_is_refused_before_it_is_parsed() -> None:
    refused(
        lambda: oip_http.parse_http(b"{" * 100, None, model="attention", max_json_bytes=99),
        "100 bytes.* is over the limit of 99",
        Kind.TOO_LARGE,
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_any_body_is_a_request_or_a_refusal(noise: bytes, length: int | None) -> None:
    for body in (noise, BINARY.encode() + noise):
        try:
            oip_http.parse_http(body, length, model="attention")
        except FarsightError:
            continue
