"""Sparse attention on q, k and v of a real decoder that reads a real text: what it does, costs and gets wrong.

What `attention.py` measures is made for the purpose; this is not. Ref: the queries and keys after rotary positions, as
the model's own attention gets them.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import antidiagonal
from benchmarks.attention import Step
from benchmarks.contenders import Inputs, matching_threshold
from service.attention import DEFAULT_BLOCK_SIZE
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.sparse import attend as sparse
from service.attention.sparse.bounded_error import BoundedErrorOutput, ErrorBound, attend_with_error_bound
from service.core.plan import PlanKind
from service.device import timed
from service.models.loading.rope import scale_rope

CAPTURED = "farsight_captured"  # the name of the attention that keeps its inputs
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    directory: Path
    tokens: int
    layers: tuple[int, ...]
    max_error: float
    rounds: int
    text: Path | None = None  # None: what CPython's interactive help says


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """query [1, Hq, L, D], key and value [1, Hkv, L, D] of one layer, and the factor of its scores."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    def sdpa(self) -> torch.Tensor:
        return scaled_dot_product_attention(*self.tensors, is_causal=True, scale=self.scale, enable_gqa=True)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as the service would have answered it, in turn with SDPA."""

    layer: int
    kind: str  # what answered
    reason: str
    density: float | None  # of the answer; None: exact
    attempts_pairs: float  # scored pairs over visible ones, attempts and audits included
    reported_upper: float
    error: float  # true relative Frobenius error, over all heads and rows
    head_errors: tuple[float, ...]
    seconds: float  # median
    sdpa_s: float
    ratio: float  # SDPA's seconds over ours
    antidiagonal_error: float | None  # of XAttention's selection at about our density; None: our answer was exact


def steps(settings: Settings) -> int:
    return 1 + len(settings.layers)


def run(settings: Settings, step: Step) -> Iterator[Layer]:
    """Read the text once with the model, then measure layer by layer."""
    step(f"{settings.tokens:,} tokens through {settings.directory.name}")
    inputs = capture(settings)
    for layer in settings.layers:
        step(f"layer {layer}")
        yield measure(settings, layer, inputs.pop(layer))


def capture(settings: Settings) -> dict[int, LayerInputs]:
    """Inputs of the attention of some layers. Positions over the model's own length are scaled with YaRN.

    Raises ValueError if the text is too short, or the model has no such layer.
    """
    config = AutoConfig.from_pretrained(settings.directory)
    if not all(0 <= layer < config.num_hidden_layers for layer in settings.layers):
        raise ValueError(f"layers: expected 0 to {config.num_hidden_layers - 1}, got {settings.layers}")
    trained = config.max_position_embeddings
    if settings.tokens > trained:
        scale_rope(settings.directory.name, config, {"rope_type": "yarn", "factor": settings.tokens / trained})
    kept: dict[int, LayerInputs] = {}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        inputs = LayerInputs(query, key, value, more["scaling"])
        if module.layer_idx in settings.layers:
            kept[module.layer_idx] = inputs
        return inputs.sdpa().transpose(1, 2), None

    AttentionInterface.register(CAPTURED, attention)
    module: Any = AutoModelForCausalLM.from_pretrained(
        settings.directory, config=config, attn_implementation=CAPTURED, dtype=torch.float32
    )
    with torch.inference_mode():
        module.base_model(input_ids=ids_of(settings), use_cache=False)
    return kept


def ids_of(settings: Settings) -> torch.Tensor:
    """[1, tokens] of the text. Raises ValueError if it has fewer."""
    text = read(settings.text)
    tokenizer = AutoTokenizer.from_pretrained(settings.directory)
    ids: torch.Tensor = tokenizer(text[: 8 * settings.tokens], return_tensors="pt").input_ids[:, : settings.tokens]
    if ids.shape[1] < settings.tokens:
        raise ValueError(f"the text has {ids.shape[1]:,} tokens, expected {settings.tokens:,}")
    return ids


def read(path: Path | None) -> str:
    """The text of a file; None: what CPython's interactive help says."""
    return path.read_text() if path else "\n".join(pydoc_data.topics.topics.values())


def measure(settings: Settings, layer: int, inputs: LayerInputs) -> Layer:
    found = attend(settings, inputs)
    exact = inputs.sdpa()
    visible = exact.shape[1] * MaskSpec(is_causal=True).visible_pairs(settings.tokens, settings.tokens)
    ours, theirs = [], []
    for _ in range(settings.rounds):
        ours.append(timed(lambda: attend(settings, inputs), CPU)[1])
        theirs.append(timed(inputs.sdpa, CPU)[1])
    return Layer(
        layer=layer,
        kind=found.kind,
        reason=found.reason,
        density=found.density,
        attempts_pairs=found.pairs_scored / visible,
        reported_upper=found.error.relative_l2_upper,
        error=relative(found.out, exact),
        head_errors=tuple(relative(out, right) for out, right in zip(found.out[0], exact[0], strict=True)),
        seconds=median(ours),
        sdpa_s=median(theirs),
        ratio=median(theirs) / median(ours),
        antidiagonal_error=None if found.density is None else antidiagonal_error(inputs, found.density, exact),
    )


def antidiagonal_error(inputs: LayerInputs, density: float, exact: torch.Tensor) -> float:
    """Of XAttention's selection, at the nearest density that its threshold gives."""
    mask, scoring = MaskSpec(is_causal=True), Scoring(inputs.scale)
    threshold = matching_threshold(Inputs(*inputs.tensors, mask, ()), density)
    chosen = antidiagonal.select(inputs.query, inputs.key, mask, DEFAULT_BLOCK_SIZE, threshold, scoring=scoring)
    return relative(sparse.attend(*inputs.tensors, mask, chosen, scoring=scoring).out, exact)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((out - exact).norm() / exact.norm())


def attend(settings: Settings, inputs: LayerInputs) -> BoundedErrorOutput:
    """As the service answers: selection, sparse attention and its audit, and the exact answer where it is needed."""
    bound = ErrorBound(settings.max_error, PlanKind.DENSE)
    return attend_with_error_bound(*inputs.tensors, MaskSpec(is_causal=True), bound, scoring=Scoring(inputs.scale))
