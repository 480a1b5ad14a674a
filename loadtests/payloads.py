"""Requests prepared before the run, so that the client's cores go to sending: a pool of encoded bodies per endpoint."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

import torch
from safetensors.torch import save

from service.api.proto import open_inference_grpc_pb2 as pb
from service.attention.workloads import Tensors, diffuse, structured

MIN_TOKENS, MAX_TOKENS = 64, 8192
MAX_WORDS = 128
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
DIFFUSE_EVERY = 4  # every fourth request has no structure: it must cost what exact attention costs

TEXT = (
    "the price of a long request is known before it runs and every answer says what it used so that short work "
    "does not wait behind long work while memory time and error stay within the limits that the caller has set"
)


@dataclass(frozen=True, slots=True)
class Payload:
    length: int  # tokens of an attention request, words of an embeddings request
    body: bytes


@dataclass(frozen=True, slots=True)
class Pools:
    attention: tuple[Payload, ...]  # safetensors
    infer: tuple[Payload, ...]  # the same tensors as ModelInferRequest
    embeddings: tuple[Payload, ...]  # JSON


def log_uniform(count: int, low: int, high: int, seed: int) -> list[int]:
    """`count` lengths, one from each equal slice of the logarithm: log-uniform, and no part of it left out."""
    draw = random.Random(seed)
    span = math.log(high / low)
    return [round(low * math.exp(span * (index + draw.random()) / count)) for index in range(count)]


def build(count: int = 24, seed: int = 0, model: str = "all-MiniLM-L6-v2") -> Pools:
    """Pools of `count` requests each; equal arguments give equal bytes."""
    attention, infer = [], []
    for index, length in enumerate(log_uniform(count, MIN_TOKENS, MAX_TOKENS, seed)):
        make = diffuse if index % DIFFUSE_EVERY == DIFFUSE_EVERY - 1 else structured
        tensors = make(1, HEADS, KV_HEADS, length, HEAD_DIM, seed=seed + index)
        attention.append(Payload(length, safetensors_body(tensors)))
        infer.append(Payload(length, infer_body(tensors)))
    draw = random.Random(seed)
    embeddings = [
        Payload(words, embeddings_body(draw, words, model)) for words in log_uniform(count, 1, MAX_WORDS, seed)
    ]
    return Pools(tuple(attention), tuple(infer), tuple(embeddings))


def safetensors_body(tensors: Tensors) -> bytes:
    """query [1, Hq, L, D], key and value [1, Hkv, L, D], causal."""
    named = dict(zip(("query", "key", "value"), tensors, strict=True))
    return save(named, metadata={"options": json.dumps({"is_causal": True})})


def infer_body(tensors: Tensors) -> bytes:
    """The same as a serialized ModelInferRequest with raw contents."""
    message = pb.ModelInferRequest(model_name="attention")
    message.parameters["is_causal"].bool_param = True
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        message.inputs.add(name=name, datatype="FP32", shape=tensor.shape)
        message.raw_input_contents.append(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    serialized: bytes = message.SerializeToString()
    return serialized


def embeddings_body(draw: random.Random, words: int, model: str) -> bytes:
    return json.dumps({"model": model, "input": sentence(draw, words)}).encode()


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(TEXT.split(), k=words))
