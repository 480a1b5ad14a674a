"""What attention costs on any device, in closed form: query-key pairs, FLOPs, bytes and peak memory.

Not counted: the softmax's exponentials, norms, activations, biases and pooling (each O(n·d) or O(pairs) without a
matrix product); in sparse selection the search for outliers (16 products per key) and its products with them (few
keys); what a rejected sparse attempt selected; everything outside the device (parsing, tokenising, copies to the wire).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from service.attention import DEFAULT_BLOCK_SIZE
from service.attention.geometry import (
    AUDIT_ROWS,
    CHUNK_BYTES,
    CHUNK_KEYS,
    CHUNK_ROWS,
    LEAF_BYTES,
    RISKY_ROWS,
    ROWS_BYTES,
    SAMPLE_STRIDE,
    SLICE_FLOPS,
    SPARSE_TILE_BYTES,
    TILE_ROWS,
    leaf_bytes,
)
from service.attention.pairs import tile_length, visible_pairs
from service.core.options import AttentionOptions
from service.core.plan import Cost, PlanKind
from service.core.request import AttentionShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

TILE_ELEMENTS = CHUNK_BYTES // 4  # float32 numbers of one tile of the chunked kernel
TILE_FLOPS = SLICE_FLOPS  # of one tile of the dense kernel
# how many of them are alive together, as peaks of resident memory show (`python -m benchmarks predictions`)
DENSE_TILES, CHUNKED_TILES = 5, {"float32": 4, "bfloat16": 2, "float16": 6}
# gathered keys and values, scores and sums; or the scores of an audit's rows
SPARSE_SCRATCH_BYTES = max(4 * SPARSE_TILE_BYTES, ROWS_BYTES)
READ_EPSILON = 0.4
HEAD_LAUNCHES = 16  # of a head of sparse attention, however short
MAP_COPIES = 13  # a block map's counts, their shares and what is added, float32, and its bytes
LOOK_PASSES = 8  # a score of a row that selection looks at costs as much as 8 others
# what the process needs however small the request (allocator slack, code, thread stacks)
BASE_SCRATCH_BYTES = 3 << 20


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row of sparse attention is assumed to cost, in keys that it reads."""

    keys: int  # at READ_EPSILON
    share: float  # of the keys that it sees


# structured inputs of 2K to 128K keys, causal and not, epsilon 0.3 to 0.5: 300 to 900 keys and centroids per row
STRUCTURED = Reading(450, 0.008)
# all layers of SmolLM2-135M that reads a real text of 8,192 or 32,768 tokens, max_error 0.05
REAL_MODEL = Reading(450, 0.2)


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """The settings of a sparse plan that change its cost."""

    block_size: int = DEFAULT_BLOCK_SIZE
    audit_rows: int = AUDIT_ROWS  # per head, computed exactly
    epsilon: float = READ_EPSILON  # risk per row that selection may leave unread
    reading: Reading = STRUCTURED


DEFAULT_SPARSE = SparseSettings()


class CostFeatures(NamedTuple):
    """The counts that a plan's seconds are linear in; `calibration.py` measures the seconds per unit of each."""

    calls: int  # kernel calls: one for each segment of a ragged batch
    launches: int  # blocks that a Python loop starts
    elements: int  # numbers of queries, keys, values and outputs
    pairs: int  # scores that go through the softmax
    flops: int  # of matrix products


def attention_pairs(shape: AttentionShape, options: AttentionOptions) -> int:
    """Visible query-key pairs over all heads and sequences. Causal is counted as causal; `attn_mask` is not read."""
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
    """FLOPs of two matrix products per pair: 2·D for q·k and 2·Dv for p·v."""
    return 2 * pairs * (head_dim + value_dim)


def tensor_bytes(shape: AttentionShape) -> tuple[int, int]:
    """(query + key + value, output + lse) in bytes."""
    size = DTYPE_BYTES[shape.dtype]
    queries = shape.batch * shape.heads * shape.query_length
    keys = shape.batch * shape.kv_heads * shape.key_length
    inputs = size * (queries * shape.head_dim + keys * (shape.head_dim + shape.value_dim))
    return inputs, size * queries * shape.value_dim + 4 * queries


def attention_cost(
    kind: PlanKind, shape: AttentionShape, options: AttentionOptions, sparse: SparseSettings = DEFAULT_SPARSE
) -> Cost:
    """Cost of one attention request under one plan, with its returned weights and the audit of a sparse answer.

    Args:
        kind: how attention is computed.
        shape: sizes of the tensors.
        options: masking, and what is returned.
        sparse: settings of the sparse plan; exact plans ignore them.

    Returns:
        Pairs, FLOPs, bytes and peak bytes. Sparse pairs are assumed (`sparse_pairs`); the answer reports the pairs that
        were scored.
    """
    pairs = attention_pairs(shape, options)
    flops = pair_flops(pairs, shape.head_dim, shape.value_dim)
    if kind is PlanKind.SPARSE:
        selection = selection_flops(shape, pairs, sparse.block_size)
        pairs = sparse_pairs(pairs, _query_rows(shape), sparse) + audit_pairs(shape, pairs, sparse.audit_rows)
        flops = pair_flops(pairs, shape.head_dim, shape.value_dim) + selection
    inputs, outputs = tensor_bytes(shape)
    weights_flops, weights_size = returned_weights(shape, options)
    tensors = inputs + outputs + weights_size + MAP_COPIES * map_bytes(shape, options)
    return Cost(
        pairs=pairs,
        flops=flops + weights_flops,
        bytes=tensors,
        peak_bytes=tensors + BASE_SCRATCH_BYTES + _scratch_bytes(kind, shape, options, sparse.block_size),
    )


def attention_features(
    kind: PlanKind, shape: AttentionShape, options: AttentionOptions, sparse: SparseSettings = DEFAULT_SPARSE
) -> CostFeatures:
    """Cost features of one attention request under one plan, with its returned weights.

    Args:
        kind: how attention is computed.
        shape: sizes of the tensors.
        options: masking, and what is returned.
        sparse: settings of the sparse plan; exact plans ignore them.

    Returns:
        The counts that `DeviceProfile.attention_s` turns into seconds.
    """
    weight_pairs = returned_pairs(shape, options)
    weight_flops = pair_flops(weight_pairs, shape.head_dim, 0)
    pairs = attention_pairs(shape, options)
    calls = 1 if options.kv_lengths is None or len(set(options.kv_lengths)) == 1 else shape.batch
    rows = _query_rows(shape)
    keys = shape.batch * shape.kv_heads * shape.key_length
    width = shape.head_dim + shape.value_dim
    elements = (rows + keys) * width
    # exact kernels compute whole tiles and mask what a row must not see
    tiled = pairs if pairs == rows * shape.key_length else pairs + rows * min(shape.key_length, CHUNK_KEYS) // 2
    match kind:
        case PlanKind.DENSE:
            return CostFeatures(calls, 0, elements, tiled + weight_pairs, 2 * tiled * width + weight_flops)
        case PlanKind.CHUNKED:
            seen = pairs / max(1, rows)
            launches = ceil(shape.query_length / CHUNK_ROWS) * ceil(seen / CHUNK_KEYS)
            return CostFeatures(calls, launches, elements, tiled + weight_pairs, 2 * tiled * width + weight_flops)
        case PlanKind.SPARSE:
            scored = sparse_pairs(pairs, rows, sparse) + audit_pairs(shape, pairs, sparse.audit_rows)
            flops = pair_flops(scored, shape.head_dim, shape.value_dim)
            flops += selection_flops(shape, pairs, sparse.block_size) + weight_flops
            launches = shape.batch * shape.heads * (HEAD_LAUNCHES + ceil(shape.query_length / sparse.block_size))
            selected = LOOK_PASSES * (pairs // (SAMPLE_STRIDE * sparse.block_size))
            return CostFeatures(calls, launches, elements, scored + selected + weight_pairs, flops)


def selection_flops(shape: AttentionShape, pairs: int, block_size: int) -> int:
    """FLOPs of sparse selection: the covariance of every key block, and for each sampled row three products of D and
    one of Dv with each block."""
    covariances = 2 * shape.batch * shape.kv_heads * shape.key_length * shape.head_dim**2
    return covariances + 2 * (3 * shape.head_dim + shape.value_dim) * (pairs // (SAMPLE_STRIDE * block_size))


def sparse_pairs(pairs: int, rows: int, sparse: SparseSettings = DEFAULT_SPARSE) -> int:
    """Pairs that sparse attention is assumed to score, before selection has run. Diffuse inputs read more, and are then
    computed exactly."""
    seen = pairs / max(1, rows)
    read = sparse.reading.keys * float((READ_EPSILON / sparse.epsilon) ** 0.25)
    return ceil(rows * min(seen, read + sparse.reading.share * seen))


def audit_pairs(shape: AttentionShape, pairs: int, audit_rows: int) -> int:
    """Pairs of the rows that an audit computes exactly, each with the mean number of keys that a row sees."""
    rows = min(max(audit_rows, 2), shape.query_length) + min(RISKY_ROWS, shape.query_length)
    return ceil(rows * pairs / max(1, shape.query_length))


def returned_pairs(shape: AttentionShape, options: AttentionOptions) -> int:
    """Pairs that are scored again for the `weights` and `top_weights` of a request."""
    rows = shape.batch * shape.heads * returned_rows(shape, options)
    return rows * shape.key_length * len(weights_bytes(shape, options))


def returned_weights(shape: AttentionShape, options: AttentionOptions) -> tuple[int, int]:
    """(FLOPs, bytes with scratch) of the `weights` and `top_weights` of a request: q·k again for every named row."""
    sizes = weights_bytes(shape, options)
    scratch = 4 * 4 * TILE_ELEMENTS if sizes else 0
    return pair_flops(returned_pairs(shape, options), shape.head_dim, 0), sum(sizes.values()) + scratch


def returned_rows(shape: AttentionShape, options: AttentionOptions) -> int:
    """Query rows per head whose `weights` and `top_weights` are returned."""
    return shape.query_length if options.rows is None else len(options.rows)


def weights_bytes(shape: AttentionShape, options: AttentionOptions) -> dict[str, int]:
    """Bytes of each returned tensor: `weights` [B, Hq, rows, Lk] float32, `top_weights` [B, Hq, rows, top_k] float32
    with int64 indices."""
    rows = returned_rows(shape, options)
    each = shape.batch * shape.heads * rows
    sizes = {"weights": 4 * each * shape.key_length, "top_weights": (4 + 8) * each * options.top_k}
    return {name: size for name, size in sizes.items() if name in options.returns}


def map_bytes(shape: AttentionShape, options: AttentionOptions) -> int:
    """Of a returned `block_map` [B, Hq, r, c] uint8."""
    if "block_map" not in options.returns:
        return 0
    rows, keys = (ceil(length / tile_length(length)) for length in (shape.query_length, shape.key_length))
    return shape.batch * shape.heads * rows * keys


def _query_rows(shape: AttentionShape) -> int:
    return shape.batch * shape.heads * shape.query_length


def _scratch_bytes(kind: PlanKind, shape: AttentionShape, options: AttentionOptions, block_size: int) -> int:
    """Bytes that the kernel of a plan needs next to the tensors of the request."""
    match kind:
        case PlanKind.DENSE:
            # a tile of rows, its parts and their merge
            tile = min(_query_rows(shape), int(TILE_FLOPS / (4 * max(1, shape.key_length * shape.head_dim))))
            scratch = DENSE_TILES * 4 * tile * shape.value_dim
            if options.window is not None:  # a mask: the rows of a tile against the edges of their windows
                spanned = TILE_ROWS + sum(max(0, side) for side in options.window)
                scratch += 3 * 4 * min(TILE_ROWS, shape.query_length) * min(spanned, shape.key_length)
            return scratch
        case PlanKind.CHUNKED:
            tile = min(shape.query_length, CHUNK_ROWS) * shape.batch * shape.heads * min(shape.key_length, CHUNK_KEYS)
            return CHUNKED_TILES[shape.dtype] * 4 * min(TILE_ELEMENTS, tile)
        case PlanKind.SPARSE:
            blocks = ceil(shape.key_length / block_size)
            # one head at a time in float32: query, key, value, the outputs of read and of summarized blocks; and half
            # as much again, allocated by selection before it
            head = shape.query_length * (shape.head_dim + 2 * shape.value_dim)
            head += shape.key_length * (shape.head_dim + shape.value_dim)
            kept = shape.batch * shape.heads * blocks * ceil(shape.query_length / block_size)
            # four rows of moments for each block of every key head
            moments = 4 * shape.batch * shape.heads * blocks * (3 * shape.head_dim + shape.value_dim)
            by_blocks = 6 * head + kept + moments
            sizes = shape.batch, shape.heads, shape.kv_heads, shape.query_length, shape.key_length
            by_leaves = min(LEAF_BYTES, leaf_bytes(sizes, shape.head_dim, shape.value_dim))
            return SPARSE_SCRATCH_BYTES + max(by_blocks, by_leaves)
