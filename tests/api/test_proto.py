"""The committed stubs are those of the .proto file, and its numbers are those of the public protocol."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from service.api.proto import open_inference_grpc_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTO = "service/api/proto/open_inference_grpc.proto"
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def protoc(*arguments: str) -> None:
    run([sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", *arguments, PROTO], cwd=ROOT, check=True)


def test_the_stubs_are_current(tmp_path: Path) -> None:
    """Word by word where the generator is the recorded one, else by what they describe."""
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    stem = PROTO.removesuffix(".proto")
    committed = [(ROOT / f"{stem}{end}").read_text() for end in GENERATED]
    fresh = [(tmp_path / f"{stem}{end}").read_text() for end in GENERATED]

    def stamps(texts: list[str]) -> list[str]:
        return [line for text in texts for line in text.splitlines() if "_VERSION = '" in line or "Version:" in line]

    if stamps(committed) == stamps(fresh):
        assert committed == fresh
        return
    protoc(f"--descriptor_set_out={tmp_path / 'set.pb'}")
    (described,) = FileDescriptorSet.FromString((tmp_path / "set.pb").read_bytes()).file
    assert without_json_names(FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)) == without_json_names(
        described
    )
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        assert f"/inference.GRPCInferenceService/{method.name}'" in committed[2]


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    pending = list(file.message_type)
    while pending:
        message = pending.pop()
        pending += message.nested_type
        for field in message.field:
            field.ClearField("json_name")
    return file


def test_stubs_load_with_the_oldest_protobuf_that_is_allowed() -> None:
    text = (ROOT / PROTO.replace(".proto", "_pb2.py")).read_text()
    assert "# Protobuf Python Version: 6.31." in text
    assert "from service.api.proto import" in (ROOT / PROTO.replace(".proto", "_pb2_grpc.py")).read_text()


# message: fields in the order of their numbers, as public clients (tritonclient 2.73) have them
PUBLIC = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready",
    "ModelReadyRequest": "name version",
    "ModelReadyResponse": "ready",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name version extensions",
    "ModelMetadataRequest": "name version",
    "ModelMetadataResponse": "name versions platform inputs outputs",
    "ModelMetadataResponse.TensorMetadata": "name datatype shape",
    "ModelInferRequest": "model_name model_version id parameters inputs outputs raw_input_contents",
    "ModelInferRequest.InferInputTensor": "name datatype shape parameters contents",
    "ModelInferRequest.InferRequestedOutputTensor": "name parameters",
    "ModelInferResponse": "model_name model_version id parameters outputs raw_output_contents",
    "ModelInferResponse.InferOutputTensor": "name datatype shape parameters contents",
    "InferParameter": "bool_param int64_param string_param double_param uint64_param",
    "InferTensorContents": "bool_contents int_contents int64_contents uint_contents uint64_contents "
    "fp32_contents fp64_contents bytes_contents",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_field_numbers_are_the_public_ones(name: str) -> None:
    outer, _, inner = name.partition(".")
    descriptor = pb.DESCRIPTOR.message_types_by_name[outer]
    if inner:
        descriptor = descriptor.nested_types_by_name[inner]
    assert {field.name: field.number for field in descriptor.fields} == {
        field: number for number, field in enumerate(PUBLIC[name].split(), start=1)
    }


def test_methods_are_the_public_ones() -> None:
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    assert [method.name for method in service.methods] == [
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelInfer",
    ]
    assert all(method.input_type.name == f"{method.name}Request" for method in service.methods)
