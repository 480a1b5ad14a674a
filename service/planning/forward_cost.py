"""What a forward pass costs on any device, in closed form: its linear layers and the attention of every layer.

Not counted, next to what `attention_cost.py` leaves out: rotary frequencies and position biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

from service.attention.pairs import visible_pairs
from service.core.model_info import LOGITS_BYTES, LayerKind, ModelInfo
from service.core.options import AttentionOptions, ExplainOptions, HiddenOptions
from service.core.passes import split_by_shape, split_by_tokens
from service.core.plan import Cost, PlanKind
from service.core.request import AttentionShape, ForwardRequest
from service.planning.attention_cost import (
    BASE_SCRATCH_BYTES,
    DEFAULT_SPARSE,
    DTYPE_BYTES,
    CostFeatures,
    SparseSettings,
    attention_cost,
    pair_flops,
)

# the time of a sparse layer of a real model, attempts that failed included: this share of dense attention's, and that
# of so many keys for each row. SmolLM2-135M with a real text of 8,192 and 32,768 tokens, max_error 0.05, in the engine
SPARSE_SHARE, SPARSE_KEYS = 0.5, 1600
STATES_ONLY = ("hidden", "explain")  # tasks without the model's head, and of encoder-decoder models the encoder alone
KEPT_BYTES = 44 << 20  # the most freed activations that the C library's allocator keeps

Size = tuple[int, int]  # tokens of one input: (source, target); target is 0 unless the model is an encoder-decoder


def forward_cost(
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    *,
    max_batch_tokens: int,
    kind: PlanKind = PlanKind.DENSE,
    sparse: SparseSettings = DEFAULT_SPARSE,
) -> Cost:
    """Cost of the passes over all inputs of a request: every matrix, and the attention of every layer.

    Args:
        model: sizes and layers of the model.
        sizes: tokens of each input.
        request: its task and options.
        max_batch_tokens: most tokens of one pass.
        kind: how attention is computed in all layers.
        sparse: settings of the sparse plan; exact plans ignore them.

    Returns:
        Pairs, FLOPs, bytes and peak bytes. Sparse pairs are assumed; the answer reports the pairs that were scored.
    """
    passes = pass_tokens(model, sizes, max_batch_tokens)
    pairs, flops = _attention_cost(kind, model, sizes, request, sparse)
    if request.task == "explain":
        explained_pairs, explained_flops = _explanation_cost(model, sizes, request)
        pairs, flops = pairs + explained_pairs, flops + explained_flops
    layer_bytes = DTYPE_BYTES[model.dtype] * sum(passes) * _numbers_per_token(model) * model.num_layers
    return Cost(
        pairs=pairs,
        flops=flops + linear_flops(model, sizes, request, len(passes)),
        bytes=DTYPE_BYTES[model.dtype] * model.parameters * len(passes) + layer_bytes,
        peak_bytes=_peak_bytes(model, sizes, request, max(passes, default=0)),
    )


def forward_features(kind: PlanKind, model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest) -> CostFeatures:
    """Cost features of the attention of all layers; the rest of a pass is priced by `DeviceProfile.forward_s`.

    Args:
        kind: how attention is computed; layers with a window are exact under every plan.
        model: sizes and layers of the model.
        sizes: tokens of each input.
        request: its task.

    Returns:
        The counts that `DeviceProfile.attention_s` turns into seconds, of a sparse plan those of the dense attention
        that takes as long. No calls and launches: they are in the measured seconds of the model's smallest pass.
    """
    width, heads = 2 * model.head_dim, model.num_heads + model.num_kv_heads
    pairs = 0
    for layers in _attention_layers(model, request):
        if kind is PlanKind.SPARSE and layers.window is None:
            pairs += layers.count * model.num_heads * sum(_sparse_time(layers, size) for size in sizes)
        else:
            pairs += layers.count * model.num_heads * layer_pairs(layers, sizes)
    elements = sum(map(sum, sizes)) * heads * width * model.num_layers
    return CostFeatures(0, 0, elements, pairs, 2 * pairs * width)


def _sparse_time(layers: LayerKind, size: Size) -> int:
    """Pairs of one head that dense attention scores in the time of sparse attention."""
    pairs = layer_pairs(layers, [size])
    return min(pairs, ceil(SPARSE_SHARE * pairs + SPARSE_KEYS * sum(size)))


def layer_pairs(layers: LayerKind, sizes: Sequence[Size]) -> int:
    """Visible query-key pairs of one head of one layer of this kind, over all inputs."""
    return sum(
        count
        * visible_pairs(
            target if layers.queries == "target" else source,
            target if layers.keys == "target" else source,
            is_causal=layers.is_causal,
            causal_alignment="top_left",
            window=layers.window,
        )
        for (source, target), count in Counter(sizes).items()
    )


def pass_tokens(model: ModelInfo, sizes: Sequence[Size], max_batch_tokens: int) -> list[int]:
    """Tokens of each pass over inputs of these sizes, by the rules that models batch with (`core/passes.py`)."""
    tokens = [sum(size) for size in sizes]
    passes: Sequence[Sequence[int]]
    passes = split_by_tokens(tokens, max_batch_tokens) if model.packed else split_by_shape(sizes, max_batch_tokens)
    return [sum(tokens[index] for index in indices) for indices in passes]


def linear_flops(model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, passes: int) -> int:
    """FLOPs of all linear layers: two for each number of a matrix and each row that it multiplies. Embedding look-ups
    multiply nothing."""
    weights = model.weights if request.task in STATES_ONLY else model.task_weights
    source, target = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    numbers = weights.source * source + weights.target * target + weights.sequence * len(sizes) + weights.once * passes
    return 2 * numbers


def _attention_layers(model: ModelInfo, request: ForwardRequest) -> Sequence[LayerKind]:
    if request.task in STATES_ONLY or model.task_attention is None:
        return model.attention
    return model.task_attention


def _attention_cost(
    kind: PlanKind, model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, sparse: SparseSettings
) -> tuple[int, int]:
    """(pairs, FLOPs) of the attention of all layers; layers with a window are exact under every plan."""
    pairs = flops = 0
    for layers in _attention_layers(model, request):
        if kind is PlanKind.SPARSE and layers.window is None:
            options = AttentionOptions(is_causal=layers.is_causal)
            for (length, _), count in Counter(sizes).items():
                cost = attention_cost(kind, _shape(model, length), options, sparse)
                pairs, flops = pairs + layers.count * count * cost.pairs, flops + layers.count * count * cost.flops
        else:
            exact = layers.count * model.num_heads * layer_pairs(layers, sizes)
            pairs, flops = pairs + exact, flops + pair_flops(exact, model.head_dim, model.head_dim)
    return pairs, flops


def _shape(model: ModelInfo, length: int) -> AttentionShape:
    """Self-attention of one layer over one input."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    return AttentionShape(1, heads, kv_heads, length, length, head_dim, head_dim, model.dtype)


def _explanation_cost(model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest) -> tuple[int, int]:
    """(pairs, FLOPs) of the weights of one query row in every layer, and of all rows for a rollout."""
    longest = max(map(sum, sizes), default=0)
    weights = model.num_layers * longest * (1 + (longest if _has_rollout(request) else 0))
    pairs = weights * model.num_heads
    return pairs, pair_flops(pairs, model.head_dim, 0) + (2 * weights if _has_rollout(request) else 0)


def _has_rollout(request: ForwardRequest) -> bool:
    return isinstance(request.options, ExplainOptions) and request.options.rollout


def _numbers_per_token(model: ModelInfo) -> int:
    """Activations of one token in one layer."""
    return 15 * model.hidden_size // 2 + 2 * model.intermediate_size


def _peak_bytes(model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, largest_pass: int) -> int:
    """Bytes alive together in the largest pass (in tokens) and kept for the answer; parameters are not counted."""
    size, longest = DTYPE_BYTES[model.dtype], max(map(sum, sizes), default=0)
    activations = size * largest_pass * _numbers_per_token(model)
    peak = activations + min(KEPT_BYTES, activations) + BASE_SCRATCH_BYTES + 4 * len(sizes) * model.dimensions
    if model.position_bias:
        peak += 4 * 3 * model.num_heads * longest**2
    match request.task:
        case "score":
            peak += 3 * LOGITS_BYTES
            if model.inputs == "source and target":  # its own head computes the logits of the whole batch
                peak += 4 * 2 * largest_pass * model.vocab_size
        case "hidden":
            peak += 4 * sum(map(sum, sizes)) * model.hidden_size
            if isinstance(request.options, HiddenOptions) and request.options.layer != -1:  # all layers' are kept
                peak += size * largest_pass * model.hidden_size * (model.num_layers + 1)
        case "explain":
            peak += model.num_layers * longest * 4 * model.num_heads
            if _has_rollout(request):
                heads = model.num_heads + model.num_kv_heads
                peak += model.num_layers * longest * size * heads * model.head_dim
        case _:
            pass
    return peak
