"""Tile sizes and strides of the attention kernels, shared with the cost model. No torch."""

from __future__ import annotations

SLICE_FLOPS = 4e9  # ~40 ms at the 100 GFLOP/s that 2 AVX2 cores gave torch's attention kernel

# dense: one call of the fused kernel between checkpoints
TILE_ROWS = 1024  # fewer: keys are read too often; more: the kernel shares a triangle's work unevenly
TILE_BYTES = 64 * 2**20  # of a tile's mask or scores

# chunked: one block of scores
CHUNK_ROWS, CHUNK_KEYS = 512, 512
CHUNK_BYTES = 16 * 2**20

# exact rows of audits and returned weights
ROWS_BYTES = 16 * 2**20  # of one block of scores
AUDIT_ROWS = 59  # of a head, drawn at random: 95 % of the rows at 95 % confidence
RISKY_ROWS = 4  # of a head: those with the least mass read, audited as well
ROUNDING_ROWS = 4  # of a head: audited in float64, too, if scores are large

# sparse
SAMPLE_STRIDE = 8  # rows: selection looks at every 8th
SPARSE_TILE_BYTES = 4 * 2**20  # of one tile of scores: read four times, so it should stay in the cache
ESTIMATE_TILE_BYTES = 2 * 2**20  # of one tile of estimates: read twenty times, so it should stay in the cache
MOMENTS_BYTES = 2 * 2**20  # of keys at a time: read ten times, so they should stay in the cache
