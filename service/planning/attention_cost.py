"""What a request costs, in closed form: pairs, FLOPs, bytes and peak memory. No torch, no device.

Left out on purpose: the softmax's exponentials, norms, activations, biases and pooling (each O(n·d) or O(pairs)
without a matrix product), the search for outliers of sparse selection (16 products a key) and its products with them
(few keys), what a rejected sparse attempt selected, and everything outside the device (parsing, tokenising, copies to
the wire).
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from service.attention.pairs import visible_pairs
from service.core.options import AttentionOptions
from service.core.plan import Cost, PlanKind
from service.core.request import AttentionShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# the chunked kernel works in float32 tiles of about this many numbers, the dense one in tiles of so many FLOPs
TILE_ELEMENTS = 1 << 22
TILE_FLOPS, TILE_ROWS = 4e9, 1024
# how many of them are alive together, as peaks of resident memory show (`python -m benchmarks predictions`)
DENSE_TILES, CHUNKED_TILES = 5, {"float32": 4, "bfloat16": 2, "float16": 6}
SPARSE_TILE_BYTES = 16 << 20  # gathered keys and values, scores and sums; or of an audit's rows the scores
CHUNK_ROWS, CHUNK_KEYS = 512, 512  # of one block of the chunked kernel
# a row of sparse attention reads so many keys at that epsilon, and so large a share of what it sees stands beside
READ_KEYS, READ_SHARE, READ_EPSILON = 450, 0.008, 0.4
HEAD_LAUNCHES = 16  # of a head of sparse attention, however short
LOOK_STRIDE, LOOK_PASSES = 8, 8  # selection looks at every 8th row, and a score there costs as much as 8 others
AUDIT_ROWS, RISKY_ROWS = 59, 4  # of a head: drawn, and those that read the least
# what the process needs however small the request (allocator slack, code, thread stacks)
BASE_SCRATCH_BYTES = 3 << 20


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


class CostFeatures(NamedTuple):
    """What the time of a plan is linear in; the device's seconds for one of each are measured (`calibration.py`)."""

    calls: int  # fixed work of a call: one for each piece of a ragged batch
    launches: int  # times that a loop in Python starts the next block
    elements: int  # numbers of queries, keys, values and outputs
    pairs: int  # scores that go through the softmax
    flops: int  # of matrix products


def attention_features(
    kind: PlanKind,
    shape: AttentionShape,
    options: AttentionOptions,
    *,
    block_size: int,
    audit_rows: int = AUDIT_ROWS,
    epsilon: float = READ_EPSILON,
) -> CostFeatures:
    """Of one attention request under one plan, the weights that it returns included."""
    weighed = returned_pairs(shape, options)
    weights = pair_flops(weighed, shape.head_dim, 0)
    pairs = attention_pairs(shape, options)
    calls = 1 if options.kv_lengths is None or len(set(options.kv_lengths)) == 1 else shape.batch
    rows = shape.batch * shape.heads * shape.query_length
    keys = shape.batch * shape.kv_heads * shape.key_length
    width = shape.head_dim + shape.value_dim
    elements = (rows + keys) * width
    # exact kernels compute whole tiles, and hide what a row must not see
    tiled = pairs if pairs == rows * shape.key_length else pairs + rows * min(shape.key_length, CHUNK_KEYS) // 2
    match kind:
        case PlanKind.DENSE:
            return CostFeatures(calls, 0, elements, tiled + weighed, 2 * tiled * width + weights)
        case PlanKind.CHUNKED:
            seen = pairs / max(1, rows)
            launches = ceil(shape.query_length / CHUNK_ROWS) * ceil(seen / CHUNK_KEYS)
            return CostFeatures(calls, launches, elements, tiled + weighed, 2 * tiled * width + weights)
        case PlanKind.SPARSE:
            audited = audit_rows * shape.batch * shape.heads * shape.key_length
            scored = sparse_pairs(pairs, rows, epsilon) + audited
            flops = pair_flops(scored, shape.head_dim, shape.value_dim) + selection_flops(shape, pairs, block_size)
            launches = shape.batch * shape.heads * (HEAD_LAUNCHES + ceil(shape.query_length / block_size))
            looked = LOOK_PASSES * (pairs // (LOOK_STRIDE * block_size))
            return CostFeatures(calls, launches, elements, scored + looked + weighed, flops + weights)


def selection_flops(shape: AttentionShape, pairs: int, block_size: int) -> int:
    """The covariance of every key block; of every row looked at three products with each block and one of values."""
    covariances = 2 * shape.batch * shape.kv_heads * shape.key_length * shape.head_dim**2
    return covariances + 2 * (3 * shape.head_dim + shape.value_dim) * (pairs // (LOOK_STRIDE * block_size))


def sparse_pairs(pairs: int, rows: int, epsilon: float = READ_EPSILON) -> int:
    """Pairs that sparse attention is assumed to read before selection has looked.

    Measured on structured inputs of 2K to 128K keys, causal and not, epsilon 0.3 to 0.5: 300 to 900 keys and centroids
    a row. Diffuse inputs read more, and the executor then goes exact.
    """
    seen = pairs / max(1, rows)
    read = READ_KEYS * float((READ_EPSILON / epsilon) ** 0.25)
    return ceil(rows * min(seen, read + READ_SHARE * seen))


def audit_pairs(shape: AttentionShape, pairs: int, audit_rows: int) -> int:
    """Pairs of the rows that an audit computes exactly: as many as rows see in the mean."""
    rows = min(max(audit_rows, 2), shape.query_length) + min(RISKY_ROWS, shape.query_length)
    return ceil(rows * pairs / max(1, shape.query_length))


def attention_cost(
    kind: PlanKind,
    shape: AttentionShape,
    options: AttentionOptions,
    *,
    block_size: int,
    audit_rows: int = AUDIT_ROWS,
    epsilon: float = READ_EPSILON,
) -> Cost:
    """Work of one attention request under one plan, the weights that it asks for and the audit of a sparse answer
    included. Sparse pairs are assumed until selection has looked; an answer tells those that were read."""
    pairs = attention_pairs(shape, options)
    inputs, outputs = tensor_bytes(shape)
    flops = pair_flops(pairs, shape.head_dim, shape.value_dim)
    rows = shape.batch * shape.heads * shape.query_length
    scratch = BASE_SCRATCH_BYTES
    match kind:
        case PlanKind.DENSE:
            # a tile of rows, its parts and their merge
            tile = min(rows, int(TILE_FLOPS / (4 * max(1, shape.key_length * shape.head_dim))))
            scratch += DENSE_TILES * 4 * tile * shape.value_dim
            if options.window is not None:  # the rows of a tile against the edges of their windows: a mask
                spanned = TILE_ROWS + sum(max(0, side) for side in options.window)
                scratch += 3 * 4 * min(TILE_ROWS, shape.query_length) * min(spanned, shape.key_length)
        case PlanKind.CHUNKED:
            tile = min(shape.query_length, CHUNK_ROWS) * shape.batch * shape.heads * min(shape.key_length, CHUNK_KEYS)
            scratch += CHUNKED_TILES[shape.dtype] * 4 * min(TILE_ELEMENTS, tile)
        case PlanKind.SPARSE:
            selection = selection_flops(shape, pairs, block_size)
            read = sparse_pairs(pairs, rows, epsilon)
            pairs = read + audit_pairs(shape, pairs, audit_rows)
            flops = pair_flops(pairs, shape.head_dim, shape.value_dim) + selection
            blocks = ceil(shape.key_length / block_size)
            # one head at a time in float32: query, key, value, what is read, what stands beside it; and again half of
            # that, of selection before it
            head = shape.query_length * (shape.head_dim + 2 * shape.value_dim)
            head += shape.key_length * (shape.head_dim + shape.value_dim)
            kept = shape.batch * shape.heads * blocks * ceil(shape.query_length / block_size)
            # of every key head four rows of moments for each block
            moments = 4 * shape.batch * shape.heads * blocks * (3 * shape.head_dim + shape.value_dim)
            scratch += SPARSE_TILE_BYTES + 6 * head + kept + moments
    weights_flops, weights_size = returned_weights(shape, options)
    return Cost(
        pairs=pairs,
        flops=flops + weights_flops,
        bytes=inputs + outputs + weights_size,
        peak_bytes=inputs + outputs + weights_size + scratch,
    )


def returned_pairs(shape: AttentionShape, options: AttentionOptions) -> int:
    """Scores that are computed again for the `weights` and `top_weights` that a request asks for."""
    rows = shape.batch * shape.heads * returned_rows(shape, options)
    return rows * shape.key_length * len(weights_bytes(shape, options))


def returned_weights(shape: AttentionShape, options: AttentionOptions) -> tuple[int, int]:
    """(FLOPs, bytes) of the `weights` and `top_weights` that a request asks for: q·k again for every named row."""
    sizes = weights_bytes(shape, options)
    scratch = 4 * 4 * TILE_ELEMENTS if sizes else 0
    return pair_flops(returned_pairs(shape, options), shape.head_dim, 0), sum(sizes.values()) + scratch


def returned_rows(shape: AttentionShape, options: AttentionOptions) -> int:
    """How many query rows `weights` and `top_weights` are asked for."""
    return shape.query_length if options.rows is None else len(options.rows)


def weights_bytes(shape: AttentionShape, options: AttentionOptions) -> dict[str, int]:
    """Size of what is returned: `weights` [B, Hq, rows, Lk] float32, `top_weights` with int64 indices [.., top_k]."""
    rows = returned_rows(shape, options)
    each = shape.batch * shape.heads * rows
    sizes = {"weights": 4 * each * shape.key_length, "top_weights": (4 + 8) * each * options.top_k}
    return {name: size for name, size in sizes.items() if name in options.returns}
