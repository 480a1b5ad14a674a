"""Run inside tritonclient's own environment (its protobuf is older than Ray's): prints one JSON document.

Usage: python triton_client.py HTTP_PORT GRPC_PORT
"""

import json
import sys

import ml_dtypes
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException


def exact(query, key, value):
    scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), value)


def attention(module, client, datatype, numpy_type, **arguments):
    generator = np.random.default_rng(0)
    tensors = [generator.standard_normal((1, 2, 24, 16)).astype(numpy_type) for _ in range(3)]
    inputs = []
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        entry = module.InferInput(name, tensor.shape, datatype)
        entry.set_data_from_numpy(tensor)
        inputs.append(entry)
    outputs = [module.InferRequestedOutput("output"), module.InferRequestedOutput("lse")]
    result = client.infer("attention", inputs, outputs=outputs, request_id="triton", **arguments)
    output = result.as_numpy("output").astype(np.float64)
    wanted = exact(*(tensor.astype(np.float64) for tensor in tensors))
    return {"error": float(np.abs(output - wanted).max()), "lse": list(result.as_numpy("lse").shape)}


def embed(module, client):
    texts = np.array(["How much does this cost?", "two words"], dtype=object)
    entry = module.InferInput("text", texts.shape, "BYTES")
    entry.set_data_from_numpy(texts)
    return client.infer("all-MiniLM-L6-v2", [entry]).as_numpy("embedding").tolist()


def refusal(module, client):
    entry = module.InferInput("query", (1, 1, 1, 1), "FP32")
    entry.set_data_from_numpy(np.ones((1, 1, 1, 1), np.float32))
    try:
        client.infer("no-such-model", [entry])
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return None


def main(http_port, grpc_port):
    found = {}
    for name, module, port in (("http", triton_http, http_port), ("grpc", triton_grpc, grpc_port)):
        client = module.InferenceServerClient(f"127.0.0.1:{port}")
        metadata = client.get_model_metadata("attention")
        inputs = metadata["inputs"] if name == "http" else metadata.inputs
        found[name] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready("all-MiniLM-L6-v2"),
            "inputs": len(inputs),
            "fp32": attention(module, client, "FP32", np.float32),
            "fp16": attention(module, client, "FP16", np.float16),
            "bf16": attention(module, client, "BF16", ml_dtypes.bfloat16),
            "causal": attention(module, client, "FP32", np.float32, parameters={"mode": "chunked"}),
            "embedding": embed(module, client),
            "refusal": refusal(module, client),
        }
        client.close()
    print(json.dumps(found))


main(*sys.argv[1:])
