"""What stands for a block of keys that is not read: its mass centre, its spread and its mean value.

Keys far from their block's centre (sinks, needles) are outliers. They are left out of the statistics and attended
exactly by every row, so that a single key is never diluted by its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch.nn.functional import normalize, pad

from service.attention.geometry import MOMENTS_BYTES
from service.attention.output import Checkpoint
from service.attention.scores import LOG2_E, Scratch, cap

MAX_OUTLIERS = 8  # per block
STRETCHES = 8  # of a block, each with a centre of its own when outliers are looked for
OUTLIER_Z = 8.0  # deviations beyond the mean distance of the block's other keys from their stretch
ROUNDING = 2e-3  # of the keys' norm: distances below come from rounding, not from the keys
POWER_STEPS = 4
BITS = log(2) / 2  # bits of mass that a score variance of 1 bit^2 adds: log2(E[2^x]) of a Gaussian x
TWO_POINTS = 0.5  # bits: sqrt(E[w^2]) / E[w] of a block of which one half has all the weight is sqrt(2)
TINY, LOWEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the key blocks of one head, outliers left out; n = nK."""

    centroid: torch.Tensor  # [n, D]
    axis: torch.Tensor  # [n, D], direction of the largest variance times sqrt(BITS) deviations along it
    reach: torch.Tensor  # [n], score of the farthest key along the axis where q.axis is 1
    rest: torch.Tensor  # [n, D], BITS times the variance per channel that the axis does not explain
    size: torch.Tensor  # [n], BITS times the variance of the block in units of `profile`
    radius: torch.Tensor  # [n], largest distance of a key from the centroid
    log_weight: torch.Tensor  # [n], log2 of the number of keys, one with bias x counted as exp(x); -inf: none
    value: torch.Tensor  # [n, Dv], mean
    outliers: torch.Tensor  # [nO] int64 key positions, ascending
    value_square: float  # mean of |v|^2 over all keys that count
    profile: torch.Tensor  # [D], how the variance of this head's blocks is spread over the channels

    def masses(
        self, q: torch.Tensor, blocks: slice, softcap: float | None, scratch: Scratch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [m, D] in bits -> log2 of the mean of 2^x over each block's scores x [m, blocks]: at least (Jensen: the
        centroid's score), as estimated, and half the log2 of the mean of 4^x as estimated.

        Estimated as Gaussian, but along the axis never above the block's own farthest key. The last two are given
        relative to the first.
        """
        shape = len(q), blocks.stop - blocks.start
        least = torch.mm(q, self.centroid[blocks].T, out=scratch.take("least", *shape))
        along = torch.mm(q, self.axis[blocks].T, out=scratch.take("along", *shape)).abs_()
        rest = torch.mm(q * q, self.rest[blocks].T, out=scratch.take("rest", *shape))
        if softcap is not None:  # scores within the block shrink by the cap's slope
            slope = _cap_with_slope(least, softcap)
            along *= slope
            rest *= slope.square_()
        second = torch.mul(along, self.reach[blocks], out=scratch.take("second", *shape))
        squares = along.square_()
        first = torch.minimum(squares, second, out=scratch.take("first", *shape)).add_(rest)
        second += TWO_POINTS
        torch.minimum(squares.mul_(2), second, out=second).add_(rest, alpha=2)
        if softcap is not None:  # no score is above the cap
            room = softcap * LOG2_E - least
            torch.minimum(first, room, out=first)
            torch.minimum(second, room, out=second)
        return least, first, second

    def estimates(self, q: torch.Tensor, blocks: torch.Tensor, softcap: float | None, scratch: Scratch) -> torch.Tensor:
        """q [m, D] in bits, blocks [c] -> log2 of the estimated mean of 2^(scores) [m, c].

        One product where `masses` takes three: of a block that is not read only the overall variance is counted.
        """
        spread = (q * q) @ self.profile
        score = torch.mm(q, self.centroid[blocks].T, out=scratch.take("score", len(q), len(blocks)))
        if softcap is None:
            return score.addr_(spread, self.size[blocks])
        slope = _cap_with_slope(score, softcap)
        score += slope.square_() * spread[:, None] * self.size[blocks]
        return score.clamp_(max=softcap * LOG2_E)


def _cap_with_slope(score: torch.Tensor, softcap: float) -> torch.Tensor:
    """Caps the score in place -> the cap's slope there."""
    return 1 - (cap(score, softcap) / (softcap * LOG2_E)).square()


def moments_of(
    key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, block_size: int, pause: Checkpoint
) -> Moments:
    """key [Lk, D], value [Lk, Dv] float32, bias [Lk] of each key for every row, or none; a few blocks at a time."""
    step = block_size * max(1, MOMENTS_BYTES // (4 * key.shape[1] * block_size))
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(key), step):
        pause()
        stop = start + step
        own = None if bias is None else bias[start:stop]
        parts.append(_of_blocks(key[start:stop], value[start:stop], own, start, block_size))
    fields = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    centroid, variance, axis, reach, radius, log_weight, mean, outliers = fields
    profile = variance.mean(0)
    return Moments(
        centroid=centroid,
        axis=axis * BITS**0.5,
        reach=reach / BITS**0.5,
        rest=(variance - axis.square()).clamp_(min=0) * BITS,
        # least squares: variance ~ size x profile
        size=variance @ profile / profile.square().sum().clamp(min=TINY) * BITS,
        radius=radius,
        log_weight=log_weight,
        value=mean,
        outliers=outliers,
        value_square=_mean_square(value if bias is None else value[bias > -torch.inf]),
        profile=profile,
    )


def _of_blocks(
    key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, start: int, block_size: int
) -> tuple[torch.Tensor, ...]:
    blocks = -(-len(key) // block_size)
    missing = blocks * block_size - len(key)
    if missing:
        key, value = (pad(x, (0, 0, 0, missing)) for x in (key, value))
    keys, values = (x.view(blocks, block_size, -1) for x in (key, value))
    log_weights = key.new_zeros(len(key)) if bias is None else pad(bias * LOG2_E, (0, missing))
    log_weights[len(key) - missing :] = -torch.inf
    log_weights = log_weights.view(blocks, block_size)
    outlier = _outliers(keys, log_weights > -torch.inf)
    log_weights = log_weights.masked_fill(outlier, -torch.inf)
    top = log_weights.amax(1, keepdim=True).clamp(min=LOWEST)
    share = (log_weights - top).exp2_()
    total = share.sum(1, keepdim=True)
    share /= total.clamp(min=1)  # blocks without keys: all zero

    centroid = _mean(share, keys)
    offsets = keys - centroid[:, None]
    covariance = (offsets * share[..., None]).transpose(1, 2) @ offsets
    variance = covariance.diagonal(dim1=1, dim2=2)
    axis = _axis(covariance)
    counted = log_weights > -torch.inf  # however light: its share may be too small for a number
    radius = torch.linalg.vector_norm(offsets, dim=2).masked_fill_(~counted, 0.0).amax(1)
    projected = (offsets * axis[:, None]).sum(2).abs_().masked_fill_(~counted, 0.0)
    reach = projected.amax(1) / axis.square().sum(1).clamp(min=TINY)
    position = torch.arange(start, start + blocks * block_size, device=key.device).view(blocks, block_size)
    return (
        centroid, variance, axis, reach, radius, (total.log2() + top)[:, 0], _mean(share, values), position[outlier],
    )  # fmt: skip


def _mean_square(value: torch.Tensor) -> float:
    """Of rows [n, Dv]; no larger than a float32 can be."""
    return min(float(torch.linalg.vector_norm(value)) ** 2 / max(1, len(value)), LARGEST)


def _axis(covariance: torch.Tensor) -> torch.Tensor:
    """[n, D, D] -> [n, D]: the direction of the largest variance, times the deviation along it."""
    largest = covariance.diagonal(dim1=1, dim2=2).argmax(1)
    axis: torch.Tensor = covariance.gather(1, largest[:, None, None].expand(-1, 1, covariance.shape[2]))[:, 0]
    for _ in range(POWER_STEPS):
        unit: torch.Tensor = normalize(axis, dim=1)
        axis = (covariance * unit[:, None]).sum(2)  # twice as fast here as a batched matrix-vector product
    length = torch.linalg.vector_norm(axis, dim=1, keepdim=True)
    deviations: torch.Tensor = axis / length.clamp(min=TINY).sqrt()  # its length was the variance along it
    return deviations


def _outliers(keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """keys [n, B, D], valid [n, B] -> [n, B] bool: keys unlike any of the stretches that their block is made of.

    A distance from the block's own centre would miss a needle where a block is the border of two topics. Stretches
    and distances are judged without their own farthest keys, so that a few far ones do not hide each other.
    """
    blocks, size, width = keys.shape
    parts = STRETCHES if size % STRETCHES == 0 else 1
    norms = torch.linalg.vector_norm(keys, dim=-1).masked_fill_(~valid, 0.0)

    def distance(by: torch.Tensor) -> torch.Tensor:
        """From the nearest stretch, `by` [n, B] of its keys counted. |k - c|^2 = |k|^2 - 2 k.c + |c|^2."""
        share = by.to(keys.dtype).view(blocks * parts, -1)
        known = share.sum(1, keepdim=True)
        centres = _mean(share / known.clamp(min=1), keys.reshape(blocks * parts, -1, width)).view(blocks, parts, -1)
        length = centres.square().sum(2).masked_fill_(known.view(blocks, parts) == 0, torch.inf)
        squared = torch.baddbmm(length[:, None], keys, centres.transpose(1, 2), alpha=-2).amin(2)
        return squared.add_(norms.square()).clamp_(min=0).sqrt_().masked_fill_(~valid, 0.0)

    first = distance(valid)
    stretches = first.view(blocks * parts, -1)
    far = stretches.topk(max(1, stretches.shape[1] // 4), dim=1).indices
    distances = distance(valid & ~torch.zeros_like(stretches, dtype=torch.bool).scatter_(1, far, True).view(blocks, -1))
    farthest = distances.topk(min(MAX_OUTLIERS, size), dim=1).indices
    candidates = torch.zeros_like(valid).scatter_(1, farthest, True)
    share = (valid & ~candidates).to(keys.dtype)
    share /= share.sum(1, keepdim=True).clamp(min=1)
    average = (distances * share).sum(1, keepdim=True)
    deviation = ((distances - average).square() * share).sum(1, keepdim=True).sqrt()
    limit = average + OUTLIER_Z * deviation + ROUNDING * norms.amax(1, keepdim=True)
    found: torch.Tensor = candidates & (distances > limit) & valid
    return found


def _mean(share: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """share [n, B], rows [n, B, x] -> [n, x]."""
    mean: torch.Tensor = torch.bmm(share[:, None], rows)[:, 0]
    return mean
