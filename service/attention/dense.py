"""The fused exact kernel, a whole call at once or by blocks of rows, so that memory and time between checkpoints
stay bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch.nn.functional import pad

from service.attention.geometry import TILE_BYTES, TILE_ROWS
from service.attention.masks import Bounds, MaskSpec, as_bias, cut, offset_of, row_bounds
from service.attention.merge import Partial, merge
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring, slice_flops
from service.attention.scores import block_scores, exponentiate, grouped, lse_of, normalise

Tile = tuple[slice, slice, slice, slice]  # sequences, key heads, query heads, rows


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: MaskSpec,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq]."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, query_length, head_dim = query.shape
    key_length, value_dim = value.shape[2:]
    flops = 4.0 * batch * heads * query_length * key_length * max(head_dim, value_dim)
    if (
        scoring.softcap is None
        and mask.attn_mask is None
        and (checkpoint is None or flops <= slice_flops(query.device))
    ):
        causal = _simple(mask, query_length, key_length, query.device)
        if causal is not None:
            return AttentionOutput(*_kernel(query, key, value, causal, None, scoring.scale_for(head_dim)))

    out = query.new_empty(batch, heads, query_length, value_dim)
    lse = out.new_empty(batch, heads, query_length, dtype=torch.promote_types(query.dtype, torch.float32))
    for tile in _tiles(query, key, value, by_time=checkpoint is not None):
        if checkpoint is not None:
            checkpoint()
        b, _, heads_of_tile, rows = tile
        out[b, heads_of_tile, rows], lse[b, heads_of_tile, rows] = _attend_tile(query, key, value, mask, tile, scoring)
    return AttentionOutput(out, lse)


def _simple(mask: MaskSpec, query_length: int, key_length: int, device: torch.device) -> bool | None:
    """False: every row sees every key; True: row i sees exactly the keys j <= i; None: neither."""
    if mask.kv_lengths is not None or mask.cu_seqlens_q is not None:
        return None
    if not mask.is_causal and mask.window is None:
        return False
    if mask.is_causal and mask.window is None and offset_of(mask.causal_alignment, key_length, query_length) == 0:
        return True  # without a look at every row: that would take as long as a short call
    lo, hi = row_bounds(mask, 1, query_length, key_length, device=device)
    if bool((lo > 0).any()):
        return None
    if bool((hi == key_length).all()):
        return False
    diagonal = torch.arange(1, query_length + 1, device=device).clamp(max=key_length)
    return True if torch.equal(hi[0], diagonal) else None


def _tiles(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by_time: bool) -> Iterator[Tile]:
    """Blocks within the scratch and, with a checkpoint, the time limit; heads are split before rows."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    group = heads // kv_heads
    flops = 4.0 * group * key_length * max(head_dim, value.shape[3])
    share = max(
        flops / slice_flops(query.device) if by_time else 0.0, 4.0 * group * key_length / TILE_BYTES
    )  # of a row
    rows = max(1, min(query_length, TILE_ROWS, int(1 / share)))
    units = max(1, int(1 / (rows * share)))
    h_step, b_step = min(kv_heads, units), min(batch, max(1, units // kv_heads))
    for b in range(0, batch, b_step):
        for h in range(0, kv_heads, h_step):
            h_end = min(h + h_step, kv_heads)
            for q in range(0, query_length, rows):
                yield (
                    slice(b, min(b + b_step, batch)),
                    slice(h, h_end),
                    slice(h * group, h_end * group),
                    slice(q, min(q + rows, query_length)),
                )


def _attend_tile(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: MaskSpec, tile: Tile, scoring: Scoring
) -> Partial:
    """The rows of one tile against the keys that any of them sees."""
    b, kv_heads, heads, rows = tile
    query_length, scale = query.shape[2], scoring.scale_for(query.shape[3])
    query, key, value = query[b, heads, rows], key[b, kv_heads], value[b, kv_heads]
    lengths = None if mask.kv_lengths is None else mask.kv_lengths[b]
    index_only = replace(mask, kv_lengths=lengths, attn_mask=None)
    lo, hi = row_bounds(index_only, query.shape[0], query_length, key.shape[2], rows.start, rows.stop, query.device)
    keys = slice(int(lo.min()), int(hi.max()))
    bias = None if mask.attn_mask is None else as_bias(cut(mask.attn_mask, b, heads, rows, keys))
    key, value, bounds = key[:, :, keys], value[:, :, keys], (lo - keys.start, hi - keys.start)
    if keys.stop <= keys.start:
        return query.new_zeros(*query.shape[:3], value.shape[3]), _nothing(query)
    if scoring.softcap is not None:
        return _eager(query, key, value, bias, bounds, scoring)
    if bias is None and rows.stop - rows.start > 1:
        return attend_between(query, key, value, bounds, scale)
    return _kernel(query, key, value, False, _bias(bias, bounds, key.shape[2]), scale)


def attend_between(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds, scale: float
) -> Partial:
    """Rows that see the keys [lo, hi), `bounds` [B, Lq] each, without any other mask -> out [B, Hq, Lq, Dv], lse.

    Keys that all rows see are computed without a mask, the edges beside them apart: a mask costs up to half the speed.
    """
    lo, hi = bounds
    rows, keys = query.shape[2], key.shape[2]
    left, right = int(lo.max()), int(hi.min()) - 1  # one key less, and the right edge of a causal tile is a triangle
    if right - left < rows:
        return _edge(query, key, value, bounds, scale)
    result = _kernel(query, key[:, :, left:right], value[:, :, left:right], False, None, scale)
    for start, stop in ((0, left), (right, keys)):
        if stop > start:
            own = lo - start, hi - start
            result = merge(*result, *_edge(query, key[:, :, start:stop], value[:, :, start:stop], own, scale))
    return result[0].to(query.dtype), result[1]


def _edge(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds, scale: float) -> Partial:
    """A triangle needs no mask either."""
    lo, hi = bounds
    rows, keys = query.shape[2], key.shape[2]
    triangle = torch.arange(1, rows + 1, device=lo.device)
    if keys == rows and bool((lo <= 0).all()) and bool((hi == triangle).all()):
        return _kernel(query, key, value, True, None, scale)
    return _kernel(query, key, value, False, _bias(None, bounds, keys), scale)


def _nothing(query: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)


def _bias(bias: torch.Tensor | None, bounds: Bounds, keys: int) -> torch.Tensor | None:
    """Bias and bounds as one [B, 1 or Hq, rows, keys]; None where everything is visible."""
    lo, hi = bounds
    if bool((lo <= 0).all()) and bool((hi >= keys).all()):
        return bias
    columns = torch.arange(keys, device=lo.device)
    hidden = ((columns < lo[..., None]) | (columns >= hi[..., None]))[:, None]
    if bias is None:
        return torch.zeros(hidden.shape, device=lo.device).masked_fill_(hidden, -torch.inf)
    return bias.masked_fill(hidden, -torch.inf)


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    bounds: Bounds,
    scoring: Scoring,
) -> Partial:
    """No fused kernel caps scores."""
    lo, hi = bounds
    scores = block_scores(query, key, scoring, bias, (lo[:, None], hi[:, None]))
    weights, total, top = exponentiate(scores)
    out = normalise(grouped(weights, value.to(weights.dtype)), total)
    return out.to(query.dtype), lse_of(total, top)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    bias: torch.Tensor | None,
    scale: float,
) -> Partial:
    """One fused call. Causal is top-left. Kernels disagree about rows without keys: zeros and -inf from here on."""
    value_dim = value.shape[3]
    width = max(query.shape[3], value_dim)
    query, key, value = (x if x.shape[3] == width else pad(x, (0, width - x.shape[3])) for x in (query, key, value))
    if bias is not None and query.dtype == torch.float64:
        bias = bias.double()
    if query.is_cuda:
        from service.attention import cuda

        out, lse = cuda.attend(query, key, value, is_causal, bias, scale)
    else:
        out, lse = _cpu(query, key, value, is_causal, bias, scale)
    out = out[..., :value_dim]
    if bias is not None:
        empty = (bias.amax(-1) == -torch.inf).expand(lse.shape)
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, -torch.inf)
    return out, lse


def _cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    bias: torch.Tensor | None,
    scale: float,
) -> Partial:
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return cast(Partial, flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale))
