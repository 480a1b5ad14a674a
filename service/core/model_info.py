"""What is known of a loaded model: sizes, layers, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.core.options import ModelTask

LOGITS_BYTES = 64 * 1024**2  # of one block of next-token logits


Side = Literal["source", "target"]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Attention layers of one kind: how many there are, and who sees whom in them."""

    count: int
    is_causal: bool
    window: tuple[int, int] | None = None
    queries: Side = "source"
    keys: Side = "source"


@dataclass(frozen=True, slots=True)
class MatrixSizes:
    """How many numbers of its matrices a model multiplies with each token of the source and of the target (encoder-
    decoder models), with each sequence, and once in every pass."""

    source: int
    target: int = 0
    sequence: int = 0
    once: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a caller may know about a loaded model."""

    name: str
    task: ModelTask
    architecture: str
    dtype: str
    max_length: int  # tokens per input
    dimensions: int  # of one embedding or hidden state
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    hidden_size: int
    intermediate_size: int
    weights: MatrixSizes  # of hidden states
    task_weights: MatrixSizes  # of what the model is for: hidden states and its head
    attention: tuple[LayerKind, ...]
    packed: bool  # concurrent requests share one forward pass without padding; else only inputs of equal length do
    inputs: Literal["text", "source and target", "image"] = "text"
    labels: tuple[str, ...] = ()
    task_attention: tuple[LayerKind, ...] | None = None  # of what the model is for; None: `attention`
    position_bias: bool = False  # a number for every pair of positions: its memory is quadratic (T5)
    smallest_pass_s: float = 0.0  # a few tokens through all layers, measured at load
