"""gRPC as our own stubs and the standard services see it, through HAProxy."""

from __future__ import annotations

import random
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.api.proto import open_inference_grpc_pb2 as pb
from service.api.proto import open_inference_grpc_pb2_grpc as pb_grpc
from tests.e2e.conftest import Service

pytestmark = pytest.mark.e2e


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}", options=options) as channel:
        yield channel


def infer(*tensors: torch.Tensor, **parameters: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="attention", id="mine")
    for name, tensor in zip(("query", "key", "value"), tensors, strict=False):
        request.inputs.add(name=name, datatype="FP32", shape=list(tensor.shape))
        request.raw_input_contents.append(tensor.numpy().tobytes())
    for name, text in parameters.items():
        request.parameters[name].string_param = text
    return request


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(services)


def test_a_string_that_is_not_utf8_is_invalid(channel: grpc.Channel) -> None:
    for method in ("inference.GRPCInferenceService/ModelInfer", "grpc.health.v1.Health/Check"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{method}")(b"\x0a\x01\xff", timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "UTF-8" in caught.value.details()


def test_every_answer_says_plan_error_and_cost(channel: grpc.Channel) -> None:
    tensors = torch.randn(3, 1, 2, 16, 8)
    response = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer(*tensors, mode="sparse"))
    parameters = {name: value.string_param for name, value in response.parameters.items()}
    assert response.id == "mine"
    assert parameters["x-attention-plan"] == "sparse"
    assert float(parameters["x-attention-error"]) >= 0
    assert float(parameters["x-cost-usd"]) > 0


def test_hidden_states_of_a_transformer(channel: grpc.Channel) -> None:
    request = pb.ModelInferRequest(model_name="all-MiniLM-L6-v2")
    text = request.inputs.add(name="text", datatype="BYTES", shape=[2])
    text.contents.bytes_contents.extend([b"it was tired", b"pays"])
    request.parameters["layer"].int64_param = 2
    answer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    shapes = {one.name: list(one.shape) for one in answer.outputs}
    assert shapes == {"hidden_states": [8, 384], "lengths": [2]}
    lengths = torch.frombuffer(bytearray(answer.raw_output_contents[1]), dtype=torch.int64)
    assert lengths.tolist() == [5, 3]


def test_many_large_messages_go_both_ways_on_one_connection(channel: grpc.Channel) -> None:
    call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
    generator = random.Random(0)
    lengths = [generator.randint(100, 1000) for _ in range(20)]
    requests = [infer(*torch.randn(3, 1, 8, length, 64)) for length in lengths]
    under_way = [(index % 20, call.future(requests[index % 20], timeout=60)) for index in range(300)]
    shapes = [(index, list(answer.result().outputs[0].shape)) for index, answer in under_way]
    assert shapes == [(index, [1, 8, lengths[index], 64]) for index, _ in under_way]


def test_a_tensor_of_32_mib_travels(channel: grpc.Channel) -> None:
    query = torch.randn(1, 1, 131072, 64)
    key = torch.randn(1, 1, 8, 64)
    response = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer(query, key, key))
    output = torch.frombuffer(bytearray(response.raw_output_contents[0]), dtype=torch.float32).reshape(query.shape)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert (output - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"mode": "fast"}, grpc.StatusCode.INVALID_ARGUMENT, "mode"),
        ({"wrong": "1"}, grpc.StatusCode.INVALID_ARGUMENT, "wrong"),
        ({"timeout_s": "1e-6"}, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout"),
    ],
)
def test_refusals(channel: grpc.Channel, change: dict[str, str], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer(*torch.randn(3, 1, 1, 4, 4), **change))
    assert caught.value.code() is code
    assert message in caught.value.details()
    assert "Traceback" not in caught.value.details()
    assert "x-request-id" in dict(caught.value.trailing_metadata())
