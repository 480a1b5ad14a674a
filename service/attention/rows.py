"""Exact attention of chosen rows: what audits compare with and returned weights are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from service.attention.geometry import ROWS_BYTES
from service.attention.inputs import AttentionInputs
from service.attention.masks import Bounds, MaskSpec, bias_at, bounds_at
from service.attention.merge import Partial, merge
from service.attention.output import Checkpoint, Scoring, no_checkpoint
from service.attention.scores import block_scores, exponentiate, grouped, lse_of, normalise


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows of one sequence, chosen for each head."""

    sequence: int
    index: torch.Tensor  # [Hq, R] int64

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, Hq, L, x] -> [Hq, R, x]: the rows of a tensor."""
        return tensor[self.sequence].gather(1, self.index[..., None].expand(-1, -1, tensor.shape[3]))

    def bias(self, attn_mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """keys [n] -> [Hq, R, n] or broadcastable: the numbers of an attn_mask."""
        head = torch.arange(len(self.index), device=self.index.device)[:, None, None]
        return bias_at(attn_mask, self.sequence, head, self.index[..., None], keys)

    def limits(self, mask: MaskSpec, query_length: int, key_length: int) -> Bounds:
        """(lo, hi) [Hq, R]: the keys that the rows may see."""
        lo, hi = bounds_at(mask, self.index[None], query_length, key_length)
        sequence = self.sequence if lo.shape[0] > 1 else 0
        return lo[sequence], hi[sequence]


def score_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    rows: RowSet,
    keys: slice,
    scoring: Scoring,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> scores [Hq, R, keys] of rows, in bits; hidden ones -inf.

    `dtype` at least; that of the query if it is wider.
    """
    columns = torch.arange(keys.start, keys.stop, device=query.device)
    bias = None if mask.attn_mask is None else rows.bias(mask.attn_mask, columns)
    bounds = rows.limits(mask, query.shape[2], key.shape[2])
    part = key[rows.sequence : rows.sequence + 1, :, keys]
    chosen = rows.take(query)[None].to(torch.promote_types(query.dtype, dtype))
    return block_scores(chosen, part, scoring, bias, bounds, keys.start)[0]


def attend_rows(
    inputs: AttentionInputs,
    rows: RowSet,
    *,
    checkpoint: Checkpoint | None = None,
    dtype: torch.dtype = torch.float32,
) -> Partial:
    """Exact attention of rows: out [Hq, R, Dv], lse [Hq, R], in `dtype` at least; that of the query if it is wider."""
    query, key, value = inputs.tensors
    heads, count = rows.index.shape
    dtype = torch.promote_types(query.dtype, dtype)
    out = torch.zeros(heads, count, value.shape[3], dtype=dtype, device=query.device)
    lse = torch.full((heads, count), -torch.inf, dtype=dtype, device=query.device)
    lo, hi = rows.limits(inputs.mask, query.shape[2], key.shape[2])
    # the rows that see most come first: of a block of keys near the end, only some are left
    order = hi.argsort(dim=1, descending=True, stable=True)
    rows = RowSet(rows.sequence, rows.index.gather(1, order))
    last = hi.gather(1, order).amax(0).tolist()  # the keys that any head's row sees, falling
    numbers = heads * count  # of one key, in `dtype`
    if key.dtype != dtype:  # keys and values are copied
        numbers += key.shape[1] * (key.shape[3] + value.shape[3])
    for keys in _key_chunks(numbers * dtype.itemsize, int(lo.min()), int(hi.max())):
        (checkpoint or no_checkpoint)()
        seeing = sum(end > keys.start for end in last)
        some = RowSet(rows.sequence, rows.index[:, :seeing])
        scores = score_rows(query, key, inputs.mask, some, keys, inputs.scoring, dtype)
        weights, total, top = exponentiate(scores)
        values = value[rows.sequence : rows.sequence + 1, :, keys].to(dtype)
        part = normalise(grouped(weights[None], values)[0], total)
        out[:, :seeing], lse[:, :seeing] = merge(out[:, :seeing], lse[:, :seeing], part, lse_of(total, top))
    back = order.argsort(1)
    return out.gather(1, back[..., None].expand(out.shape)), lse.gather(1, back)


def _key_chunks(key_bytes: int, first: int, last: int) -> Iterator[slice]:
    """Ranges of keys that fit the scratch memory, if each takes so many bytes of it."""
    step = max(1, ROWS_BYTES // key_bytes)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))
