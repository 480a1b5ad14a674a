"""Sizes, layers and limits of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.core.options import ModelTask

LOGITS_BYTES = 64 * 1024**2  # one block of next-token logits

Side = Literal["source", "target"]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Attention layers of one kind: their number, and which keys a query sees in them."""

    count: int
    is_causal: bool
    window: tuple[int, int] | None = None
    queries: Side = "source"
    keys: Side = "source"


@dataclass(frozen=True, slots=True)
class MatrixSizes:
    """How many numbers of its matrices a model multiplies: each counts two FLOPs."""

    source: int  # with each source token
    target: int = 0  # with each target token of encoder-decoder models
    sequence: int = 0  # with each sequence
    once: int = 0  # in each pass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a loaded model that callers may read."""

    name: str
    task: ModelTask
    architecture: str
    dtype: str
    max_length: int  # tokens per input
    dimensions: int  # numbers of one embedding
    state_dimensions: int  # numbers of one hidden state
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    hidden_size: int
    intermediate_size: int
    weights: MatrixSizes  # for hidden states
    task_weights: MatrixSizes  # for the model's own task: hidden states and its head
    attention: tuple[LayerKind, ...]
    packed: bool  # inputs of any lengths share a pass without padding; if not, only inputs of equal shape do
    inputs: Literal["text", "source and target", "image", "audio"] = "text"
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()  # names of the texts that may go before every text of a request
    default_prompt: str | None = None
    task_attention: tuple[LayerKind, ...] | None = None  # for the model's own task; None: `attention`
    position_bias: bool = False  # adds a bias for every pair of positions, with quadratic memory (T5)
    error_gains: tuple[float, ...] = ()  # of each attention call of a pass; empty: not measured
    smallest_pass_s: float = 0.0  # fixed seconds of a pass: a few tokens through all layers, measured at load
