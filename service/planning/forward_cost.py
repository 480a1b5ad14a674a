"""What a forward pass costs, in closed form: linear layers and the attention of every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from service.attention.pairs import visible_pairs
from service.core.model_info import LOGITS_BYTES, LayerKind, ModelInfo
from service.core.options import AttentionOptions, ExplainOptions, HiddenOptions
from service.core.plan import Cost, PlanKind
from service.core.request import AttentionShape, ForwardRequest
from service.planning.attention_cost import (
    BASE_SCRATCH_BYTES,
    DTYPE_BYTES,
    READ_EPSILON,
    CostFeatures,
    attention_cost,
    attention_features,
    pair_flops,
)

STATES_ONLY = ("hidden", "explain")  # tasks without the model's head, and of encoder-decoder models the encoder alone


Size = tuple[int, int]  # tokens of one input: source, and target where the model has one


KEPT_BYTES = 44 << 20  # of freed activations that the C library's allocator holds, at most


def forward_features(
    kind: PlanKind,
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    *,
    block_size: int,
    epsilon: float = READ_EPSILON,
) -> CostFeatures:
    """Of the attention inside all sequences of a pass; what a pass costs by itself is `ModelInfo.smallest_pass_s`.

    Layers with a window are exact under every plan.
    """
    width, heads = 2 * model.head_dim, model.num_heads + model.num_kv_heads
    total = CostFeatures(0, 0, sum(map(sum, sizes)) * heads * width * model.num_layers, 0, 0)
    for layers in _attention(model, request):
        if kind is PlanKind.SPARSE and layers.window is None:
            options = AttentionOptions(is_causal=layers.is_causal)
            for (length, _), count in Counter(sizes).items():
                shape = AttentionShape(
                    1, model.num_heads, model.num_kv_heads, length, length, model.head_dim, model.head_dim, model.dtype
                )
                own = attention_features(kind, shape, options, block_size=block_size, epsilon=epsilon)
                total = CostFeatures(*(a + layers.count * count * b for a, b in zip(total, own, strict=True)))
        else:
            pairs = layers.count * model.num_heads * layer_pairs(layers, sizes)
            total = total._replace(pairs=total.pairs + pairs, flops=total.flops + 2 * pairs * width)
    return total


def layer_pairs(layers: LayerKind, sizes: Sequence[Size]) -> int:
    """Visible pairs of one head of one such layer."""
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


def _attention(model: ModelInfo, request: ForwardRequest) -> Sequence[LayerKind]:
    if request.task in STATES_ONLY or model.task_attention is None:
        return model.attention
    return model.task_attention


def pass_tokens(model: ModelInfo, sizes: Sequence[Size], max_batch_tokens: int) -> list[int]:
    """Tokens of each pass that inputs of these sizes take; the rules of `models/packing.py`."""
    if not model.packed:
        found = []
        for size, count in Counter(sizes).items():
            step = max(1, max_batch_tokens // max(1, sum(size)))
            found += [sum(size) * step] * (count // step) + [sum(size) * (count % step)] * (count % step > 0)
        return found
    passes = [0]
    for size in sizes:
        if passes[-1] and passes[-1] + sum(size) > max_batch_tokens:
            passes.append(0)
        passes[-1] += sum(size)
    return passes


def linear_flops(model: ModelInfo, sizes: Sequence[Size], request: ForwardRequest, passes: int) -> int:
    """Two for each number of a matrix and each row that it is multiplied with. Embedding look-ups multiply nothing."""
    weights = model.weights if request.task in STATES_ONLY else model.task_weights
    source, target = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    numbers = weights.source * source + weights.target * target + weights.sequence * len(sizes) + weights.once * passes
    return 2 * numbers


def forward_cost(
    model: ModelInfo,
    sizes: Sequence[Size],
    request: ForwardRequest,
    *,
    max_batch_tokens: int,
    kind: PlanKind = PlanKind.DENSE,
    block_size: int = 128,
    epsilon: float = READ_EPSILON,
) -> Cost:
    """Passes over all sequences, each of (source, target) tokens: every matrix with every row that it is given, and the
    attention of every layer; under a sparse plan the pairs that it is assumed to read.

    Left out beside what this file leaves out: rotary frequencies and position biases.
    """
    passes = pass_tokens(model, sizes, max_batch_tokens)
    linear = linear_flops(model, sizes, request, len(passes))
    layers, longest = _attention(model, request), max(map(sum, sizes), default=0)
    pairs = sum(one.count * layer_pairs(one, sizes) for one in layers) * model.num_heads
    attention = pair_flops(pairs, model.head_dim, model.head_dim)
    if kind is PlanKind.SPARSE:
        whole = forward_sparse(model, layers, sizes, block_size, epsilon)
        pairs, attention = whole.pairs, whole.flops
    if request.task == "explain":
        rollout = isinstance(request.options, ExplainOptions) and request.options.rollout
        looked = model.num_layers * longest * (1 + (longest if rollout else 0))
        pairs += looked * model.num_heads
        attention += pair_flops(looked * model.num_heads, model.head_dim, 0) + (2 * looked if rollout else 0)
    size = DTYPE_BYTES[model.dtype]
    alive = max(passes, default=0)
    numbers = 15 * model.hidden_size // 2 + 2 * model.intermediate_size  # of a token in a layer
    activations = size * alive * numbers
    scratch = min(KEPT_BYTES, activations) + BASE_SCRATCH_BYTES + 4 * len(sizes) * model.dimensions
    if model.position_bias:
        scratch += 4 * 3 * model.num_heads * longest**2
    match request.task:
        case "score":
            scratch += 3 * LOGITS_BYTES
            if model.inputs == "source and target":  # its own head makes the logits of a whole batch
                scratch += 4 * 2 * alive * model.vocab_size
        case "hidden":
            tokens = sum(map(sum, sizes))
            scratch += 4 * tokens * model.hidden_size
            if isinstance(request.options, HiddenOptions) and request.options.layer != -1:  # all layers' are kept
                scratch += size * alive * model.hidden_size * (model.num_layers + 1)
        case "explain":
            scratch += model.num_layers * longest * 4 * model.num_heads
            if isinstance(request.options, ExplainOptions) and request.options.rollout:
                heads = model.num_heads + model.num_kv_heads
                scratch += model.num_layers * longest * size * heads * model.head_dim
        case _:
            pass
    return Cost(
        pairs=pairs,
        flops=linear + attention,
        bytes=size * (model.parameters * len(passes) + sum(passes) * numbers * model.num_layers),
        peak_bytes=activations + scratch,
    )


def forward_sparse(
    model: ModelInfo, layers: Sequence[LayerKind], sizes: Sequence[Size], block_size: int, epsilon: float
) -> Cost:
    """Of the attention in a sparse pass: layers with a window stay exact."""
    pairs = flops = 0
    for one in layers:
        if one.window is not None:
            own = layer_pairs(one, sizes) * one.count * model.num_heads
            pairs, flops = pairs + own, flops + pair_flops(own, model.head_dim, model.head_dim)
            continue
        for (length, _), count in Counter(sizes).items():
            shape = AttentionShape(
                1, model.num_heads, model.num_kv_heads, length, length, model.head_dim, model.head_dim, model.dtype
            )
            options = AttentionOptions(is_causal=one.is_causal)
            work = attention_cost(PlanKind.SPARSE, shape, options, block_size=block_size, epsilon=epsilon)
            pairs, flops = pairs + one.count * count * work.pairs, flops + one.count * count * work.flops
    return Cost(pairs, flops, 0, 0)
