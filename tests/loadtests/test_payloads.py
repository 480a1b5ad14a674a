"""The pools hold what the service accepts, the same on both transports and in every run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from loadtests import payloads
from loadtests.payloads import HEAD_DIM, HEADS, KV_HEADS, MAX_TOKENS, MIN_TOKENS, Pools, build, log_uniform
from service.api import codec, safetensors_io
from service.api.grpc import parse_message
from service.api.proto import open_inference_grpc_pb2 as pb
from service.api.schema import EmbeddingsBody
from service.cli import DEMO_MODEL

COUNT = 4


@pytest.fixture(scope="module")
def pools(request: pytest.FixtureRequest) -> Pools:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payloads, "MAX_TOKENS", 512)
        return build(COUNT, seed=3)


def test_lengths_are_log_uniform_over_the_whole_range() -> None:
    lengths = log_uniform(700, MIN_TOKENS, MAX_TOKENS, seed=1)
    assert lengths == log_uniform(700, MIN_TOKENS, MAX_TOKENS, seed=1)
    assert lengths != log_uniform(700, MIN_TOKENS, MAX_TOKENS, seed=2)
    assert all(MIN_TOKENS <= length <= MAX_TOKENS for length in lengths)
    octaves = [sum(math.floor(math.log2(length / MIN_TOKENS)) == octave for length in lengths) for octave in range(7)]
    assert all(98 <= count <= 102 for count in octaves)


def test_equal_arguments_give_equal_bytes(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "MAX_TOKENS", 512)
    assert build(COUNT, seed=3) == pools
    assert build(COUNT, seed=4) != pools


def test_attention_bodies_are_what_the_service_parses(pools: Pools) -> None:
    for payload in pools.attention:
        tensors, options = safetensors_io.tensors_from_safetensors(payload.body)
        named, unknown = codec.split_tensors(tensors)
        assert unknown == {}
        assert options == {"is_causal": True}
        assert named["query"].shape == (1, HEADS, payload.length, HEAD_DIM)
        assert named["key"].shape == named["value"].shape == (1, KV_HEADS, payload.length, HEAD_DIM)


def test_grpc_bodies_carry_the_same_tensors(pools: Pools) -> None:
    for over_http, over_grpc in zip(pools.attention, pools.infer, strict=True):
        tensors, options = safetensors_io.tensors_from_safetensors(over_http.body)
        infer = parse_message(pb.ModelInferRequest.FromString(over_grpc.body))
        assert infer.model == "attention"
        assert infer.parameters == options
        assert over_grpc.length == over_http.length
        for entry in infer.inputs:
            assert isinstance(entry.value, torch.Tensor)
            assert torch.equal(entry.value, tensors[entry.name])


def test_embeddings_bodies_are_what_the_service_parses(pools: Pools) -> None:
    for payload in pools.embeddings:
        body = EmbeddingsBody.model_validate(json.loads(payload.body))
        assert body.model == DEMO_MODEL.name
        assert isinstance(body.input, str)
        assert len(body.input.split()) == payload.length
