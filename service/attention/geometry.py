"""Tile sizes and strides of the attention kernels, shared with the cost model. No torch."""

from __future__ import annotations

from typing import NamedTuple

SLICE_FLOPS = 4e9  # ~40 ms at the 100 GFLOP/s that 2 AVX2 cores gave torch's attention kernel

# dense: one call of the fused kernel between checkpoints
TILE_ROWS = 1024  # fewer: keys are read too often; more: the kernel shares a triangle's work unevenly
TILE_BYTES = 64 * 2**20  # of a tile's mask or scores

# chunked: one block of scores
CHUNK_ROWS, CHUNK_KEYS = 512, 512
CHUNK_BYTES = 16 * 2**20

# exact rows of audits and returned weights
ROWS_BYTES = 4 * 2**20  # of one block of scores: read five times, so it should stay in the cache
AUDIT_ROWS = 59  # of a head, drawn at random: 95 % of the rows at 95 % confidence
RISKY_ROWS = 4  # of a head: those with the least mass read, audited as well
ROUNDING_ROWS = 4  # of a head: audited in float64, too, if scores are large

# sparse
SAMPLE_STRIDE = 8  # rows: selection looks at every 8th
SPARSE_TILE_BYTES = 4 * 2**20  # of one tile of scores: read four times, so it should stay in the cache
ESTIMATE_TILE_BYTES = 2 * 2**20  # of one tile of estimates: read twenty times, so it should stay in the cache
MOMENTS_BYTES = 2 * 2**20  # of keys at a time: read ten times, so they should stay in the cache

PILOT_ROWS, PILOT_TILES = 16, 8  # of a tile's block; at most
LEAF_BYTES = 2 * 2**30  # of all that leaves keep; larger inputs are read by blocks, one head at a time
LEAF_TILE_BYTES = 8 * 2**20  # of the masses of a tile's leaves


class LeafShape(NamedTuple):
    """How the keys of sparse attention are cut, and the rows that read them."""

    segment: int  # keys that are ordered together; as many rows are computed together, and read their own exactly
    size: int  # keys of a leaf: read, or answered for, as one
    rows: int  # that share a choice of leaves


def leaf_shape(key_length: int) -> LeafShape:
    """Of shorter inputs their own segment costs most; of longer ones scoring all leaves, and copying those read."""
    if key_length < 2**14:
        return LeafShape(512, 32, 256)
    return LeafShape(1024, 32 if key_length < 2**17 else 64, 256)


def leaf_bytes(shape: tuple[int, int, int, int, int], head_dim: int, value_dim: int) -> int:
    """What sparse attention by leaves keeps of [B, Hq, Hkv, Lq, Lk]: mapped queries, outputs, keys and values of all
    heads, and of one group of heads what its pilot and a block of rows need."""
    batch, heads, kv_heads, rows, keys = shape
    kept = batch * heads * rows * (head_dim + 2 * value_dim + 6) + batch * kv_heads * keys * (head_dim + value_dim + 4)
    leaves = leaf_shape(keys)
    group = heads // kv_heads * keys
    pilot = group * PILOT_ROWS + group // leaves.size * (PILOT_TILES * PILOT_ROWS * value_dim + 2 * leaves.rows)
    return 4 * (kept + pilot)
