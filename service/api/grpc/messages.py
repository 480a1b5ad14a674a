"""ModelInfer messages into infer requests, and answers into messages."""

from __future__ import annotations

from typing import Any

from service.api.answer import estimate_document, headers
from service.api.codec import dump_json, raw_bytes
from service.api.handler import Parsed
from service.api.open_inference import tensors
from service.api.open_inference.inputs import InferInput
from service.api.open_inference.metadata import MODEL_VERSION
from service.api.open_inference.parameters import check_no_parameters
from service.api.open_inference.protocol import InferRequest, outputs
from service.api.proto import open_inference_grpc_pb2 as pb
from service.core.answer import Answer
from service.engine.pricing import Estimate
from service.errors import invalid, too_large

TYPED_FIELDS = {  # of InferTensorContents, by datatype
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def message_bytes(request: pb.ModelInferRequest, limit: int) -> int:
    """Bytes of the inputs, by their shapes or by what is really there, whichever is more.

    Raises FarsightError (413) over `limit` bytes. ByteSize would copy the message to learn the same.
    """
    claimed = sum(tensors.claimed_bytes(entry.name, entry.datatype, entry.shape) for entry in request.inputs)
    fields = set(TYPED_FIELDS.values())
    typed = sum(8 * len(getattr(entry.contents, field)) for entry in request.inputs for field in fields)
    raw = sum(len(content) for content in request.raw_input_contents)
    size = max(claimed, typed, raw)
    if size > limit:
        raise too_large("request tensors", size, limit, "bytes", param="inputs")
    return size


def parse_message(request: pb.ModelInferRequest) -> InferRequest:
    """Inputs from raw contents, one for each input, or else from the typed contents of every input.

    Raises FarsightError (422).
    """
    raw = list(request.raw_input_contents)  # each access copies, so once
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            f"raw_input_contents: expected one for each of {len(request.inputs)} inputs, got {len(raw)}", param="inputs"
        )
    inputs = []
    for index, entry in enumerate(request.inputs):
        shape = tuple(entry.shape)
        check_no_parameters(entry.name, entry.parameters)
        if raw and entry.HasField("contents"):
            raise invalid(f"{entry.name}: contents and raw_input_contents exclude each other", param=entry.name)
        value = tensors.from_raw(entry.name, entry.datatype, shape, raw[index]) if raw else _typed(entry)
        inputs.append(InferInput(entry.name, entry.datatype, shape, value))
    requested: dict[str, bool | None] = {}
    for output in request.outputs:
        if output.name in requested:
            raise invalid(f"output {output.name[:96]!r} is requested twice", param="outputs")
        check_no_parameters(output.name, output.parameters, ignored=("binary_data",))  # always raw here
        requested[output.name] = None
    return InferRequest(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        inputs=tuple(inputs),
        parameters={name: _parameter(name, value) for name, value in request.parameters.items()},
        outputs=requested,
        binary=True,
    )


def render_message(answer: Answer, parsed: Parsed[InferRequest]) -> pb.ModelInferResponse:
    """The answer with raw outputs; plan, accuracy and price as parameters."""
    infer = parsed.form
    response = pb.ModelInferResponse(model_name=infer.model, model_version=MODEL_VERSION, id=infer.id)
    for name, text in headers(answer).items():
        response.parameters[name].string_param = text
    for name, tensor in outputs(answer, parsed.request).items():
        response.outputs.add(name=name, datatype=tensors.datatype_of(tensor), shape=tensor.shape)
        response.raw_output_contents.append(bytes(raw_bytes(tensor)))
    return response


def render_price(estimate: Estimate, infer: InferRequest, hour_usd: float) -> pb.ModelInferResponse:
    """The price as JSON in the parameter `estimate`."""
    response = pb.ModelInferResponse(model_name=infer.model, id=infer.id)
    response.parameters["estimate"].string_param = dump_json(estimate_document(estimate, hour_usd)).decode()
    return response


def _typed(entry: pb.ModelInferRequest.InferInputTensor) -> tensors.Value:
    """FP16 and BF16 have no typed field: `from_list` says so."""
    wanted = TYPED_FIELDS.get(entry.datatype)
    filled = [descriptor.name for descriptor, _ in entry.contents.ListFields()]
    if any(name != wanted for name in filled) and wanted is not None:
        raise invalid(f"{entry.name}: expected {entry.datatype} in {wanted}, got {', '.join(filled)}", param=entry.name)
    values: list[Any] = list(getattr(entry.contents, wanted)) if wanted else []
    return tensors.from_list(entry.name, entry.datatype, tuple(entry.shape), values)


def _parameter(name: str, value: pb.InferParameter) -> bool | int | float | str:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameter {name[:96]!r} has no value", param=name[:96])
    chosen: bool | int | float | str = getattr(value, kind)
    return chosen
