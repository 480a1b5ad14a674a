"""What the tests of transports share."""

from __future__ import annotations

from service.core.model_info import LayerKind, MatrixSizes, ModelInfo

INFO = ModelInfo(
    name="mini",
    task="embed",
    architecture="bert",
    dtype="float32",
    max_length=128,
    dimensions=3,
    state_dimensions=3,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=100,
    parameters=1000,
    hidden_size=4,
    intermediate_size=4,
    weights=MatrixSizes(100),
    task_weights=MatrixSizes(100),
    attention=(LayerKind(1, is_causal=False),),
    packed=True,
)
