"""ModelInfer messages that are right but for something deep inside them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from service.api.grpc.messages import TYPED_FIELDS
from service.api.proto import open_inference_grpc_pb2 as pb
from tests.fuzz.bodies import as_list, infer_inputs, infer_parameters
from tests.fuzz.values import damaged

Draw = st.DrawFn

SHAPES = ([], [0], [-1], [2**62, 2], [2**31, 2**31, 4], [1] * 9, [-(2**63)], [1, 1, 1, 1])
NAMES = ("query", "key", "text", "nothing", "", "é" * 200, "attn_mask", "input_ids")


@st.composite
def messages(draw: Draw) -> bytes:
    """A message as its bytes."""
    model, inputs, data = draw(infer_inputs())
    request = pb.ModelInferRequest(model_name=model, id=draw(st.sampled_from(("1", "", "x" * 400, "é"))))
    is_raw = draw(st.booleans())
    for entry, content in zip(inputs, data, strict=True):
        tensor = request.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        if is_raw or entry["datatype"] not in TYPED_FIELDS:
            request.raw_input_contents.append(draw(damaged(content, draw(st.sampled_from((0, 0, 0, 1))))))
        else:
            values = as_list(entry["datatype"], entry["shape"], content)
            values = [one.encode() for one in values] if entry["datatype"] == "BYTES" else values
            getattr(tensor.contents, TYPED_FIELDS[entry["datatype"]]).extend(values)
    for name, value in draw(infer_parameters()).items():
        _set(request.parameters[name.encode("utf-8", "replace").decode()], value)
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        _mutate(draw, request)
    raw = request.SerializeToString()
    return draw(damaged(raw, 1)) if draw(st.integers(0, 5)) == 0 else raw


def _set(parameter: pb.InferParameter, value: Any) -> None:
    match value:
        case bool():
            parameter.bool_param = value
        case int() if -(2**63) <= value < 2**63:
            parameter.int64_param = value
        case float():
            parameter.double_param = value
        case _:
            parameter.string_param = str(value).encode("utf-8", "replace").decode()


def _mutate(draw: Draw, request: pb.ModelInferRequest) -> None:
    """One thing wrong."""
    at = draw(st.integers(0, len(request.inputs) - 1)) if request.inputs else 0
    entry = request.inputs[at] if request.inputs else request.inputs.add()
    match draw(st.sampled_from(range(11))):
        case 0:
            del entry.shape[:]
            entry.shape.extend(draw(st.sampled_from(SHAPES)))
        case 1:
            entry.name = draw(st.sampled_from(NAMES))
        case 2:
            entry.datatype = draw(st.sampled_from((*TYPED_FIELDS, "FP16", "BF16", "UINT64", "", "é")))
        case 3:
            del request.inputs[at:]
        case 4:
            request.inputs.add().CopyFrom(entry)
        case 5 if request.raw_input_contents:
            del request.raw_input_contents[-1]
        case 6:
            request.outputs.add(name=draw(st.sampled_from((*NAMES, "output", "lse", "hidden_states", "embedding"))))
        case 7:
            entry.contents.fp64_contents.append(draw(st.sampled_from((1.0, float("nan"), 1e308))))
        case 8:
            request.parameters["no_value"].SetInParent()
        case 9:
            request.model_name = draw(st.sampled_from(NAMES))
        case _:
            request.model_version = draw(st.sampled_from(("1", "2", "é" * 300)))
