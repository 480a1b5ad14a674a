"""The Open Inference Protocol (KServe v2) without a transport: infer requests, and the outputs of their answers.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from service.api.open_inference.inputs import InferInput, by_name, forward_inputs, numbers
from service.api.open_inference.metadata import find_model, input_names, output_names
from service.api.open_inference.parameters import parse_options
from service.attention.validate import check_attention
from service.core.answer import Answer
from service.core.model_info import ModelInfo
from service.core.options import (
    AttentionOptions,
    ClassifyOptions,
    EmbedOptions,
    ForwardOptions,
    HiddenOptions,
    Returned,
    ScoreOptions,
    Task,
)
from service.core.request import AttentionRequest, ForwardRequest, Request
from service.errors import invalid

_OPTIONS: dict[Task, type[ForwardOptions]] = {
    "embed": EmbedOptions,
    "classify": ClassifyOptions,
    "rerank": ClassifyOptions,
    "score": ScoreOptions,
    "hidden": HiddenOptions,
}
ENDPOINT = "infer"  # as metrics, ledger and log line name the route
_HIDDEN_OUTPUTS = ("hidden_states", "lengths")
_RETURNED: dict[str, Returned] = {  # output of attention: what has to be in `returns` for it
    "output": "output",
    "lse": "lse",
    "weights": "weights",
    "top_weights": "top_weights",
    "top_indices": "top_weights",
    "block_map": "block_map",
}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An infer request as both transports parse it, before it is checked against the model."""

    model: str
    version: str
    id: str  # chosen by the caller and echoed; may be empty
    inputs: tuple[InferInput, ...]
    parameters: Mapping[str, Any]
    outputs: Mapping[str, bool | None] = field(default_factory=dict)  # requested: as raw bytes? None: as `binary`
    binary: bool = False  # HTTP: whether outputs are raw bytes by default

    def is_binary(self, output: str) -> bool:
        """Whether `output` is sent as raw bytes; `top_weights` and `top_indices` follow one another."""
        pair = "top_weights" if output == "top_indices" else "top_indices" if output == "top_weights" else output
        requested = self.outputs.get(output, self.outputs.get(pair))
        return self.binary if requested is None else requested


def parse_infer(
    infer: InferRequest,
    infos: Sequence[ModelInfo],
    *,
    request_id: str,
    timeout_s: float | None = None,
    tenant: str = "default",
) -> Request:
    """The engine's request. `timeout_s` is the transport's own limit; the shorter one counts.

    Raises NOT_FOUND for an unknown model, INVALID for wrong inputs, outputs or parameters.
    """
    info = find_model(infer.model, infer.version, infos)
    accepted, returned = input_names(info), output_names(info)
    named = by_name(infer.inputs, accepted, infer.model)
    for name in infer.outputs:
        if name not in returned:
            raise invalid(
                f"unknown output {name[:96]!r} of {infer.model!r}; expected one of {', '.join(returned)}",
                param="outputs",
            )
    if info is None:
        return _attention_request(infer, named, request_id, timeout_s, tenant)
    task = _task(infer, info)
    options = parse_options(_OPTIONS[task], infer.parameters, timeout_s)
    inputs = forward_inputs(named, accepted, task)
    return ForwardRequest(request_id, info.name, task, options, tenant=tenant, endpoint=ENDPOINT, **inputs)


def _attention_request(
    infer: InferRequest, named: Mapping[str, InferInput], request_id: str, timeout_s: float | None, tenant: str
) -> AttentionRequest:
    for name in ("query", "key", "value"):
        if name not in named:
            raise invalid(f"input {name!r} is missing", param=name)
    tensors = {name: numbers(entry) for name, entry in named.items()}
    options = parse_options(AttentionOptions, infer.parameters, timeout_s)
    if infer.outputs:
        explicit = options.returns if infer.parameters.get("returns") is not None else ()
        union = dict.fromkeys([*explicit, *(_RETURNED[name] for name in infer.outputs)])
        options = options.model_copy(update={"returns": tuple(union)})
    attn_mask = tensors.get("attn_mask")
    query, key, value = check_attention(tensors["query"], tensors["key"], tensors["value"], attn_mask, options)
    rank = tensors["query"].ndim
    if rank == 3 and attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask[None]
    return AttentionRequest(
        id=request_id,
        query=query,
        key=key,
        value=value,
        options=options,
        attn_mask=attn_mask,
        rank=rank,
        tenant=tenant,
        endpoint=ENDPOINT,
    )


def _task(infer: InferRequest, info: ModelInfo) -> Task:
    """The model's own task, or `hidden` if its outputs (or `layer`) are requested. Raises INVALID for a mixture."""
    hidden = [name in _HIDDEN_OUTPUTS for name in infer.outputs]
    if any(hidden) and not all(hidden):
        names = " and ".join(_HIDDEN_OUTPUTS)
        raise invalid(f"outputs: expected {names} without the model's other outputs", param="outputs")
    return "hidden" if any(hidden) or "layer" in infer.parameters else info.task


def outputs(answer: Answer, request: Request) -> dict[str, torch.Tensor]:
    """The tensors to send, by name; without the batch axis if the request came without it."""
    if isinstance(request, ForwardRequest):
        return dict(answer.tensors)
    wanted = {name: tensor for name, tensor in answer.tensors.items() if _RETURNED[name] in request.options.returns}
    if request.rank == 3:
        return {name: tensor[0] for name, tensor in wanted.items()}
    return wanted
