"""The bodies are what the service accepts, the same on both transports and in every run."""

from __future__ import annotations

import json

import pytest
import torch

from loadtests.mix import Endpoint, Planned
from loadtests.payloads import HEAD_DIM, HEADS, MODEL, TRACE_HEADS, Bodies, build, check_trace
from service.api import codec, safetensors_io
from service.api.grpc.methods import parse_message
from service.api.proto import open_inference_grpc_pb2 as pb
from service.api.schema import EmbeddingsBody
from service.models.demo import DEMO_MODEL

LENGTHS = (64, 100, 130, 512)
PLANNED = [Planned(0.0, endpoint, length) for endpoint in Endpoint for length in LENGTHS]


@pytest.fixture(scope="module")
def bodies() -> Bodies:
    return build(PLANNED, seed=3)


def test_every_request_has_a_body_and_equal_arguments_give_equal_bytes(bodies: Bodies) -> None:
    assert bodies.keys() == {(request.endpoint, request.length) for request in PLANNED}
    assert build(PLANNED * 2, seed=3) == bodies
    assert build(PLANNED, seed=4) != bodies
    assert build(PLANNED[:1]).keys() == {(PLANNED[0].endpoint, PLANNED[0].length)}


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_bodies_are_what_the_service_parses(bodies: Bodies, length: int) -> None:
    tensors, options = safetensors_io.tensors_from_safetensors(bodies[Endpoint.ATTENTION, length])
    named, unknown = codec.split_tensors(tensors)
    assert unknown == {}
    assert options == {"is_causal": True}
    assert named["query"].shape == (1, HEADS[0], length, HEAD_DIM)
    assert named["key"].shape == named["value"].shape == (1, HEADS[1], length, HEAD_DIM)


def test_heads_are_as_requested() -> None:
    (body,) = build([Planned(0.0, Endpoint.ATTENTION, 64)], heads=(8, 8)).values()
    tensors, _ = safetensors_io.tensors_from_safetensors(body)
    assert {name: tensor.shape[1] for name, tensor in tensors.items()} == {"query": 8, "key": 8, "value": 8}


def test_a_trace_that_cannot_be_sent_is_refused_with_numbers() -> None:
    planned = [Planned(0.0, Endpoint.INFER, length) for length in (64, 64, 128)]
    check_trace(planned, max_bytes=128 * 6144, free_bytes=(64 + 128) * 6144)
    with pytest.raises(ValueError, match=r"1 of the trace's 3 .*BYTES=786431: attention of 128 tokens has 786432"):
        check_trace(planned, max_bytes=128 * 6144 - 1, free_bytes=2**30)
    with pytest.raises(ValueError, match=r"need 0\.0 GiB"):
        check_trace(planned, max_bytes=2**30, free_bytes=(64 + 128) * 6144 - 1)
    bodies = build(planned, heads=TRACE_HEADS)
    assert len(bodies[Endpoint.INFER, 128]) == pytest.approx(128 * 6144, rel=1e-3)
    check_trace([Planned(0.0, Endpoint.EMBEDDINGS, 512)], max_bytes=1, free_bytes=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_grpc_bodies_carry_the_same_tensors(bodies: Bodies, length: int) -> None:
    tensors, options = safetensors_io.tensors_from_safetensors(bodies[Endpoint.ATTENTION, length])
    infer = parse_message(pb.ModelInferRequest.FromString(bodies[Endpoint.INFER, length]))
    assert infer.model == "attention"
    assert infer.parameters == options
    for entry in infer.inputs:
        assert isinstance(entry.value, torch.Tensor)
        assert torch.equal(entry.value, tensors[entry.name])


def test_embeddings_bodies_are_what_the_service_parses(bodies: Bodies) -> None:
    assert DEMO_MODEL.name == MODEL
    for length in LENGTHS:
        body = EmbeddingsBody.model_validate(json.loads(bodies[Endpoint.EMBEDDINGS, length]))
        assert body.model == MODEL
        assert isinstance(body.input, str)
        assert len(body.input.split()) == length
