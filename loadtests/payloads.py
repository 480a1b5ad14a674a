"""Bodies encoded before the run, so that the client only sends: one for each endpoint and length."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence

import torch
from safetensors.torch import save

from loadtests.mix import Endpoint, Planned
from service.api.proto import open_inference_grpc_pb2 as pb
from service.attention.inputs import Tensors
from service.attention.synthetic import InputShape, diffuse, structured
from service.simulate import pricing

HEADS = 4, 2  # query, key and value
TRACE_HEADS = pricing.HEADS, pricing.HEADS  # of a trace: the attention that `farsight simulate` assumes
HEAD_DIM = 64
DIFFUSE_EVERY = 4  # every fourth length has no structure and must cost as much as exact attention
MODEL = "all-MiniLM-L6-v2"

TEXT = (
    "the price of a long request is known before it runs and every answer says what it used so that short work "
    "does not wait behind long work while memory time and error stay within the limits that the caller has set"
)

Bodies = dict[tuple[Endpoint, int], bytes]


def build(planned: Iterable[Planned], seed: int = 0, model: str = MODEL, heads: tuple[int, int] = HEADS) -> Bodies:
    """Bodies of these requests. Equal arguments give equal bytes, and both transports send the same tensors."""
    wanted = {(request.endpoint, request.length) for request in planned}
    lengths = sorted({length for endpoint, length in wanted if endpoint is not Endpoint.EMBEDDINGS})
    found: Bodies = {}
    for index, length in enumerate(lengths):
        make = diffuse if index % DIFFUSE_EVERY == DIFFUSE_EVERY - 1 else structured
        tensors = make(InputShape(1, *heads, length, HEAD_DIM), seed=seed + index)
        for endpoint, encode in ((Endpoint.ATTENTION, safetensors_body), (Endpoint.INFER, infer_body)):
            if (endpoint, length) in wanted:
                found[endpoint, length] = encode(tensors)
    draw = random.Random(seed)
    for endpoint, length in sorted(wanted - found.keys()):
        found[endpoint, length] = embeddings_body(draw, length, model)
    return found


def check_trace(planned: Sequence[Planned], max_bytes: int, free_bytes: int) -> None:
    """Raise ValueError if tensors exceed `max_bytes`, the limit of a request, or all bodies exceed `free_bytes`."""
    token_bytes = 4 * HEAD_DIM * (TRACE_HEADS[0] + 2 * TRACE_HEADS[1])
    attention = [request for request in planned if request.endpoint is not Endpoint.EMBEDDINGS]
    over = [request.length for request in attention if token_bytes * request.length > max_bytes]
    if over:
        raise ValueError(
            f"{len(over)} of the trace's {len(planned)} requests are over FARSIGHT_MAX_REQUEST_BYTES={max_bytes}: "
            f"attention of {max(over):,} tokens has {token_bytes * max(over)} bytes"
        )
    needed = sum(token_bytes * length for _, length in {(request.endpoint, request.length) for request in attention})
    if needed > free_bytes:
        raise ValueError(
            f"the bodies of the trace need {needed / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free: they "
            "are encoded before the run; play a shorter part (--duration)"
        )


def safetensors_body(tensors: Tensors) -> bytes:
    """query [1, Hq, L, D], key and value [1, Hkv, L, D], causal, as safetensors."""
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
    """A text of `words` words; the service truncates it, because texts of a trace may exceed the model's limit."""
    return json.dumps({"model": model, "input": sentence(draw, words), "truncate": "end"}).encode()


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(TEXT.split(), k=words))
