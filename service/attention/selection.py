"""Which key blocks a block of queries attends to: moments and outliers. Training-free, for any q, k, v.

A key block is its centroid c, its variance per channel v and a few outlier keys. Outliers are attended exactly by
every row, as extra columns, so that a single needle or sink is never diluted. The rest of a block is estimated as
n_b exp(s q.c + s^2 q^2.v / 2), the mass of n_b Gaussian keys, and a row drops its lightest blocks while their
estimated share stays under epsilon. A query block takes the union of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from service.attention.masks import MaskSpec, as_bias, bias_at, bounds_at, cut
from service.attention.output import Checkpoint, no_checkpoint
from service.attention.scores import cap, default_scale

MAX_OUTLIERS = 8  # per block
OUTLIER_Z = 2.5  # standard deviations of the block's own distances from its centroid
RISKY_ROWS = 4  # per head, reported for the audit to check apart
SCRATCH_BYTES = 64 * 2**20
MOMENTS_BYTES = 8 * 2**20  # of keys at a time


@dataclass(frozen=True, slots=True)
class Selection:
    """Blocks to compute. Partially visible ones are always kept, invisible ones never."""

    block_size: int  # of queries and of keys
    keep: torch.Tensor  # [B, Hq, nQ, nK] bool
    outliers: torch.Tensor  # [B, Hkv, nO] int64 key positions; -1: none
    pairs: int  # visible pairs of the kept blocks and of outliers in other blocks, over all heads
    visible: int  # visible pairs, over all heads
    risky_rows: torch.Tensor  # [n, 3] int64 (batch, head, row) with the largest estimated dropped share

    @property
    def density(self) -> float:
        return self.pairs / max(self.visible, 1)


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one key head: centroid and variance [nK, D] and log share of keys [nK] without outliers [nO]."""

    centroid: torch.Tensor
    variance: torch.Tensor
    log_share: torch.Tensor
    outliers: torch.Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the rows of a few query blocks can see, the same for every head of a sequence."""

    rows: torch.Tensor  # [n] int64, n = blocks x block size; the last row repeated where the last block is ragged
    real: torch.Tensor  # [n, 1] int64: 0 for the repeated ones
    lo: torch.Tensor  # [n, 1]
    hi: torch.Tensor  # [n, 1]
    overlap: torch.Tensor  # [n, nK] visible keys of each key block
    forced: torch.Tensor  # [blocks, nK] seen only in part: diagonal, window edges, ragged ends
    seen: torch.Tensor  # [blocks, nK] seen by any row
    pairs: torch.Tensor  # [blocks, nK] visible pairs


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: MaskSpec,
    block_size: int,
    epsilon: float,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Selection:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D] -> the blocks to compute."""
    pause = checkpoint or no_checkpoint
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    scale = default_scale(scale, head_dim)
    q_blocks, k_blocks = -(-query_length // block_size), -(-key_length // block_size)
    keep = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.bool, device=query.device)
    outliers: list[torch.Tensor] = []
    risky: list[torch.Tensor] = []
    pairs = visible = 0
    for b in range(batch):
        moments = [_moments(key[b, h], block_size, pause) for h in range(kv_heads)]
        outliers += [head.outliers for head in moments]
        dropped = torch.zeros(heads, query_length, device=query.device)
        step = _blocks_per_group(moments, mask, key_length, block_size)
        for start in range(0, q_blocks, step):
            blocks = slice(start, min(start + step, q_blocks))
            view = _geometry(mask, b, query_length, key_length, block_size, blocks, query.device)
            visible += heads * int(view.pairs.sum())
            for h in range(heads):
                pause()
                head = moments[h // (heads // kv_heads)]
                q = query[b, h, view.rows].float() * scale
                keys = key[b, h // (heads // kv_heads)]
                kept, share = _choose(q, keys, head, view, mask, (b, h), epsilon, softcap)
                keep[b, h, blocks] = kept
                dropped[h, view.rows] = share
                pairs += _count(kept, view, head.outliers, block_size)
        worst = dropped.topk(min(RISKY_ROWS, query_length)).indices  # [Hq, n]
        head_of = torch.arange(heads, device=query.device)[:, None].expand_as(worst)
        risky.append(torch.stack((torch.full_like(worst, b), head_of, worst), -1).view(-1, 3))
    columns = max(len(found) for found in outliers)
    padded = torch.stack([pad(found, (0, columns - len(found)), value=-1) for found in outliers])
    return Selection(block_size, keep, padded.view(batch, kv_heads, columns), pairs, visible, torch.cat(risky))


def _blocks_per_group(moments: list[Moments], mask: MaskSpec, key_length: int, block_size: int) -> int:
    """Query blocks of one head that fit the scratch together."""
    numbers = max(8 * len(head.centroid) + 4 * len(head.outliers) for head in moments)
    if mask.attn_mask is not None and mask.attn_mask.dim() > 1 and mask.attn_mask.shape[-2] > 1:
        numbers += 3 * key_length
    return max(1, SCRATCH_BYTES // (4 * numbers * block_size))


def _moments(key: torch.Tensor, block_size: int, pause: Checkpoint) -> Moments:
    """key [Lk, D] -> centroid, variance and outliers of each block, a few blocks at a time."""
    step = block_size * max(1, MOMENTS_BYTES // (4 * key.shape[1] * block_size))
    parts: list[Moments] = []
    for start in range(0, len(key), step):
        pause()
        parts.append(_moments_of(key[start : start + step], start, block_size))
    fields = zip(*((part.centroid, part.variance, part.log_share, part.outliers) for part in parts), strict=True)
    return Moments(*(torch.cat(tensors) for tensors in fields))


def _moments_of(key: torch.Tensor, start: int, block_size: int) -> Moments:
    key_length, head_dim = key.shape
    blocks = -(-key_length // block_size)
    keys = pad(key.float(), (0, 0, 0, blocks * block_size - key_length)).view(blocks, block_size, head_dim)
    position = torch.arange(blocks * block_size, device=key.device).view(blocks, block_size)
    valid = position < key_length
    count = valid.sum(1, keepdim=True)

    def mean(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return (x * of[..., None]).sum(1) / of.sum(1, keepdim=True)

    distance = (keys - mean(keys, valid)[:, None]).norm(dim=-1)
    average = (distance * valid).sum(1, keepdim=True) / count
    spread = (((distance - average).square() * valid).sum(1, keepdim=True) / count).sqrt()
    far, where = distance.masked_fill(~valid, 0.0).topk(min(MAX_OUTLIERS, block_size), dim=1)
    is_outlier = torch.zeros_like(valid).scatter_(1, where, far > average + OUTLIER_Z * spread)

    plain = valid & ~is_outlier
    centroid = mean(keys, plain)
    variance = mean((keys - centroid[:, None]).square(), plain)
    return Moments(centroid, variance, (plain.sum(1) / count[:, 0]).log(), start + position[is_outlier])


def _geometry(
    mask: MaskSpec, b: int, query_length: int, key_length: int, block_size: int, blocks: slice, device: torch.device
) -> Geometry:
    wanted = torch.arange(blocks.start * block_size, blocks.stop * block_size, device=device)
    real = wanted < query_length
    rows = wanted.clamp(max=query_length - 1)
    lo, hi = bounds_at(mask, rows[None], query_length, key_length)
    which = b if len(lo) > 1 else 0
    lo, hi = lo[which, :, None], hi[which, :, None]
    begin = torch.arange(0, key_length, block_size, device=device)
    end = (begin + block_size).clamp(max=key_length)
    overlap = (torch.minimum(hi, end) - torch.maximum(lo, begin)).clamp(min=0)
    by_block = overlap.view(-1, block_size, len(begin))
    seen = by_block.amax(1) > 0
    forced = seen & (by_block.amin(1) < end - begin)
    pairs = (overlap * real[:, None]).view(by_block.shape).sum(1)
    return Geometry(rows, real[:, None].long(), lo, hi, overlap, forced, seen, pairs)


def _choose(
    q: torch.Tensor,
    key: torch.Tensor,
    moments: Moments,
    view: Geometry,
    mask: MaskSpec,
    which: tuple[int, int],
    epsilon: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, D] scaled -> kept [blocks, nK] and the estimated share [n] of each row's mass that is dropped."""
    blocks, k_blocks = view.forced.shape
    estimate = cap(q @ moments.centroid.T + (q * q) @ (moments.variance.T / 2), softcap)
    estimate += _log_counts(mask, which, view, key.shape[0]) + moments.log_share
    exact = cap(q @ key[moments.outliers].float().T, softcap)
    if mask.attn_mask is not None:
        exact += bias_at(mask.attn_mask, *which, view.rows[:, None], moments.outliers)
    exact.masked_fill_((moments.outliers < view.lo) | (moments.outliers >= view.hi), -torch.inf)

    top = torch.cat((estimate, exact), 1).amax(1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    mass = (estimate - top).exp_()
    total = mass.sum(1) + (exact - top).exp_().sum(1)

    forced = view.forced.repeat_interleave(len(q) // blocks, 0)
    droppable = mass.masked_fill(forced, 0.0)
    wanted = ~(droppable < _lightest_kept(droppable, epsilon * total))  # written so that NaN is kept
    kept = (wanted.view(blocks, -1, k_blocks).any(1) & view.seen) | view.forced
    lost = mass.masked_fill_(kept.repeat_interleave(len(q) // blocks, 0), 0.0).sum(1)
    return kept, (lost / total.clamp(min=torch.finfo(total.dtype).tiny)).nan_to_num(1.0)


def _lightest_kept(mass: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """mass [n, nK], budget [n] -> [n, 1]: the lightest block that the budget does not pay for; inf if none."""
    ordered = mass.sort(dim=1).values
    affordable = (ordered.cumsum(1) <= budget[:, None]).sum(1, keepdim=True)
    return pad(ordered, (0, 1), value=torch.inf).gather(1, affordable)


def _log_counts(mask: MaskSpec, which: tuple[int, int], view: Geometry, key_length: int) -> torch.Tensor:
    """[n, nK]: log of the visible keys of each block, a key with bias x counted as exp(x)."""
    counts = view.overlap.float().log()
    if mask.attn_mask is None:
        return counts
    b, h = which
    start, stop = int(view.rows[0]), int(view.rows[-1]) + 1
    part = cut(mask.attn_mask, slice(b, b + 1), slice(h, h + 1), slice(start, stop), slice(0, key_length))[0, 0]
    bias = as_bias(part).expand(part.shape[0], key_length)
    k_blocks = view.overlap.shape[1]
    block_size = len(view.rows) // view.forced.shape[0]
    padded = pad(bias, (0, k_blocks * block_size - key_length), value=-torch.inf)
    sizes = torch.full((k_blocks,), float(block_size), device=bias.device)
    sizes[-1] = key_length - (k_blocks - 1) * block_size
    mean = padded.view(len(bias), k_blocks, block_size).logsumexp(-1) - sizes.log()
    return counts + (mean if len(mean) == 1 else mean[view.rows - start])


def _count(kept: torch.Tensor, view: Geometry, outliers: torch.Tensor, block_size: int) -> int:
    """Visible pairs of the kept blocks, and of outliers whose block is not kept."""
    seen = (outliers >= view.lo) & (outliers < view.hi)
    columns = (seen * view.real).view(len(kept), len(view.rows) // len(kept), len(outliers)).sum(1)
    return int((kept * view.pairs).sum() + (~kept[:, outliers // block_size] * columns).sum())
