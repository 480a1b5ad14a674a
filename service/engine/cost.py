"""What a request costs, in closed form: pairs, FLOPs, bytes and peak memory. No torch, no device.

Left out on purpose: the softmax's exponentials, norms, activations, biases and pooling (each O(n·d) or O(pairs)
without a matrix product), and everything outside the device (parsing, tokenising, copies to the wire).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from service.attention.pairs import visible_pairs
from service.core import AttentionOptions, AttentionShape, ModelInfo, PlanKind, Work

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# the chunked and sparse kernels work in float32 tiles of about this many numbers
TILE_ELEMENTS = 1 << 22
# what the process needs however small the request (allocator slack, code, thread stacks)
BASE_SCRATCH_BYTES = 1 << 20


def attention_pairs(shape: AttentionShape, options: AttentionOptions) -> int:
    """Visible pairs over all heads and sequences."""
    lengths = options.kv_lengths or (shape.key_length,) * shape.batch
    return shape.heads * sum(
        visible_pairs(
            shape.query_length,
            length,
            is_causal=options.is_causal,
            causal_alignment=options.causal_alignment,
            window=options.window,
        )
        for length in lengths
    )


def pair_flops(pairs: int, head_dim: int, value_dim: int) -> int:
    """Two matrix products: 2·D for q·k and 2·Dv for p·v, each pair."""
    return 2 * pairs * (head_dim + value_dim)


def tensor_bytes(shape: AttentionShape) -> tuple[int, int]:
    """(query + key + value, output + lse) in bytes."""
    size = DTYPE_BYTES[shape.dtype]
    queries = shape.batch * shape.heads * shape.query_length
    keys = shape.batch * shape.kv_heads * shape.key_length
    inputs = size * (queries * shape.head_dim + keys * (shape.head_dim + shape.value_dim))
    return inputs, size * queries * shape.value_dim + 4 * queries


def assumed_density(key_length: int) -> float:
    """Share of pairs that sparse is assumed to keep before selection has looked: measured on structured inputs
    (0.27 at 8K, 0.16 at 16K, epsilon 0.05); diffuse inputs keep more, and the executor then goes exact."""
    return min(1.0, 0.02 + 2200 / key_length)


def attention_work(kind: PlanKind, shape: AttentionShape, options: AttentionOptions, *, block_size: int) -> Work:
    """Work of one attention request under one plan, the weights that it asks for included."""
    pairs = attention_pairs(shape, options)
    inputs, outputs = tensor_bytes(shape)
    size = DTYPE_BYTES[shape.dtype]
    flops = pair_flops(pairs, shape.head_dim, shape.value_dim)
    scratch = BASE_SCRATCH_BYTES
    match kind:
        case PlanKind.DENSE:
            # masks that are not a plain triangle are materialised for a block of rows, never n x n
            scratch += size * min(shape.query_length, 1024) * shape.key_length
        case PlanKind.CHUNKED:
            scratch += 3 * 4 * min(TILE_ELEMENTS, shape.batch * shape.heads * shape.query_length * shape.key_length)
        case PlanKind.SPARSE:
            kept = ceil(pairs * assumed_density(shape.key_length))
            blocks = ceil(shape.key_length / block_size)
            # selection: two products (centroid, variance) of every query row with every key block
            selection = 4 * shape.batch * shape.heads * shape.query_length * blocks * shape.head_dim
            pairs, flops = kept, pair_flops(kept, shape.head_dim, shape.value_dim) + selection
            scratch += 4 * 4 * TILE_ELEMENTS + 3 * shape.batch * shape.heads * blocks * blocks
            scratch += 4 * shape.batch * shape.heads * shape.query_length * shape.value_dim
    weights_flops, weights_size = returned_weights(shape, options)
    return Work(
        pairs=pairs,
        flops=flops + weights_flops,
        bytes=inputs + outputs + weights_size,
        peak_bytes=inputs + outputs + weights_size + scratch,
    )


def returned_weights(shape: AttentionShape, options: AttentionOptions) -> tuple[int, int]:
    """(FLOPs, bytes) of the `weights` and `top_weights` that a request asks for: q·k again for every named row."""
    sizes = weights_bytes(shape, options)
    rows = returned_rows(shape, options)
    flops = 2 * shape.head_dim * shape.batch * shape.heads * rows * shape.key_length
    scratch = 4 * 4 * TILE_ELEMENTS if sizes else 0
    return flops * len(sizes), sum(sizes.values()) + scratch


def returned_rows(shape: AttentionShape, options: AttentionOptions) -> int:
    """How many query rows `weights` and `top_weights` are asked for."""
    return shape.query_length if options.rows is None else len(options.rows)


def weights_bytes(shape: AttentionShape, options: AttentionOptions) -> dict[str, int]:
    """Size of what is returned: `weights` [B, Hq, rows, Lk] float32, `top_weights` with int64 indices [.., top_k]."""
    rows = returned_rows(shape, options)
    each = shape.batch * shape.heads * rows
    sizes = {"weights": 4 * each * shape.key_length, "top_weights": (4 + 8) * each * options.top_k}
    return {name: size for name, size in sizes.items() if name in options.returns}


def forward_work(model: ModelInfo, lengths: Sequence[int], *, max_batch_tokens: int) -> Work:
    """One pass over packed sequences: projections, MLP and bidirectional attention of every layer.

    FLOPs per layer: 2·T·h·(2·Hq·D + 2·Hkv·D) for the four projections, 4·T·h·i for the MLP (BERT: two
    matrices), 4·D·Hq·sum(n²) for attention. Embedding look-ups multiply nothing.
    """
    tokens = sum(lengths)
    hidden, width = model.hidden_size, model.head_dim
    projections = 2 * tokens * hidden * 2 * width * (model.num_heads + model.num_kv_heads)
    mlp = 4 * tokens * hidden * model.intermediate_size
    pairs = sum(length * length for length in lengths) * model.num_heads * model.num_layers
    size = DTYPE_BYTES[model.dtype]
    alive = min(tokens, max(max_batch_tokens, max(lengths, default=0)))
    activations = size * alive * (6 * hidden + 2 * model.intermediate_size)
    outputs = 4 * len(lengths) * model.dimensions
    return Work(
        pairs=pairs,
        flops=model.num_layers * (projections + mlp) + pair_flops(pairs, width, width),
        bytes=size * model.parameters + activations * model.num_layers,
        peak_bytes=activations + outputs + BASE_SCRATCH_BYTES,
    )
