"""A sketch of what may follow `service/attention/sparse`: small leaves of keys that are alike. Causal, on the CPU.

Keys are ordered by content within causal segments, by balanced splits along the axis on which they vary most, down to
leaves of a few keys. A leaf that is not read is answered for by its mean: its mass is estimated from its centre and the
variance of its keys, taken as the same in all directions, so that one matrix product scores all leaves for all rows.
(Axes of their own made the estimate worse: far too high for some leaves.) The lightest leaves are left unread while
their risks, added in quadrature, stay under a threshold. Keys unlike their neighbours are read by every row.

It makes no promise about its error, and has no masks, no windows and no other devices: `real_attention.py` compares it
with what the service does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch.nn.functional import normalize

from service.attention.scores import LOG2_E

LEAF = 16  # keys
SEGMENT = 1024  # keys that are ordered together; as many rows are computed together
FINE = 128  # the same within a row's own segment, of which it sees only the beginning
ROWS = 128  # that share a choice of leaves
OUTLIERS = 0.005  # of all keys
STRETCH = 64  # neighbours that an outlier is unlike
HIDDEN = -1e4  # log2 of the mass of what is not there; finite, so that no difference is NaN
LARGEST_VARIATION = 1e4  # of the weights inside a leaf


@dataclass(frozen=True, slots=True)
class Leaves:
    """n leaves of one key head: those of whole segments, then those of whole fine ones."""

    keys: torch.Tensor  # [n, LEAF * D]
    values: torch.Tensor  # [n, LEAF * Dv]
    hidden: torch.Tensor  # [n, LEAF]: HIDDEN for outliers, which stand apart, else 0
    scorer: torch.Tensor  # [n, D + 2]: mean key, variance of one of its numbers, log2 of the number of keys
    mean: torch.Tensor  # [n, Dv] values
    spread: torch.Tensor  # [n]: mean square distance of a value from the mean
    outliers: torch.Tensor  # [m] positions

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Indices of the leaves of whole segments before key `start`, then of the fine ones from there to `stop`."""
        fine = len(self.keys) // 2
        return torch.cat((torch.arange(start // LEAF), torch.arange(fine + start // LEAF, fine + stop // LEAF)))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, threshold: float
) -> tuple[torch.Tensor, float]:
    """query [1, Hq, L, D], key and value [1, Hkv, L, D] float32 -> (out [1, Hq, L, D], share of pairs that were read).

    Raises ValueError unless L is a multiple of SEGMENT.
    """
    heads, length = query.shape[1:3]
    if length % SEGMENT:
        raise ValueError(f"expected a multiple of {SEGMENT} tokens, got {length}")
    out, read = torch.empty_like(query), 0
    group = heads // key.shape[1]
    for head in range(heads):
        if head % group == 0:
            keys, values = key[0, head // group], value[0, head // group]
            leaves = leaves_of(keys, values)
        for start in range(0, length, SEGMENT):
            rows = slice(start, start + SEGMENT)
            tile = _Tile(query[0, head, rows] * (scale * LOG2_E), keys, values, leaves, start)
            part, count = tile.attend(threshold)
            out[0, head, rows] = part
            read += count
    return out, read / (heads * length * (length + 1) / 2)


def leaves_of(key: torch.Tensor, value: torch.Tensor) -> Leaves:
    """key [L, D], value [L, Dv] -> the leaves of one head."""
    stretches = key.view(-1, STRETCH, key.shape[1])
    distance = (stretches - stretches.mean(1, keepdim=True)).square().sum(2).flatten()
    outliers = distance.topk(ceil(OUTLIERS * len(key))).indices.sort().values
    is_own = torch.ones(len(key)).index_fill_(0, outliers, 0.0)
    order = torch.cat([ordered(key, size) for size in (SEGMENT, FINE)])
    keys, values = key[order].view(-1, LEAF, key.shape[1]), value[order].view(-1, LEAF, value.shape[1])
    own = is_own[order].view(-1, LEAF)
    count = own.sum(1, keepdim=True).clamp(min=1)
    share = (own / count)[:, None]
    centre, mean = (torch.bmm(share, rows)[:, 0] for rows in (keys, values))
    variance, spread = (
        (torch.bmm(share, rows.square().sum(2, keepdim=True))[:, 0, 0] - middle.square().sum(1)).clamp(min=0)
        for rows, middle in ((keys, centre), (values, mean))
    )
    size = torch.where(own.any(1, keepdim=True), count.log2(), HIDDEN)
    scorer = torch.cat((centre, variance[:, None] / key.shape[1], size), 1)
    hidden = torch.where(own > 0, 0.0, HIDDEN)
    return Leaves(keys.flatten(1), values.flatten(1), hidden, scorer, mean, spread, outliers)


def ordered(key: torch.Tensor, segment: int) -> torch.Tensor:
    """key [L, D] -> [L] positions: keys of one leaf stand together, and segments stay where they are."""
    nodes = torch.arange(len(key)).view(-1, segment)
    while nodes.shape[1] > LEAF:
        own = key[nodes.flatten()].view(*nodes.shape, -1)
        own -= own.mean(1, keepdim=True)
        axis = own[torch.arange(len(own)), own.square().sum(2).argmax(1)]  # towards the farthest key
        for _ in range(2):  # power iteration
            along = torch.bmm(own, normalize(axis, dim=1)[..., None])
            axis = torch.bmm(along.transpose(1, 2), own)[:, 0]
        rank = torch.bmm(own, axis[..., None])[..., 0].argsort(1)
        nodes = nodes.gather(1, rank).view(-1, nodes.shape[1] // 2)
    return nodes.flatten()


class _Tile:
    """SEGMENT rows of one head."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaves: Leaves, start: int) -> None:
        """query [SEGMENT, D] in bits; the rows begin at `start`."""
        self.query, self.leaves = query, leaves
        self.index = leaves.part(start, start + SEGMENT)
        self.mean = leaves.mean[self.index]
        self.square = query.square().sum(1, keepdim=True) / LOG2_E  # |q|^2 in nats, times LOG2_E
        window = torch.arange(SEGMENT) // FINE  # keys of a row's own window are read one by one
        scored = torch.cat((query, self.square / 2, torch.ones_like(self.square)), 1)
        self.mass = scored @ leaves.scorer[self.index].T  # log2
        fine = torch.arange(SEGMENT // LEAF) // (FINE // LEAF)
        self.mass[:, -len(fine) :].masked_fill_(fine >= window[:, None], HIDDEN)
        self._read_near(key, value, start, window)
        self.mass.sub_(self.top).exp2_()

    def _read_near(self, key: torch.Tensor, value: torch.Tensor, start: int, window: torch.Tensor) -> None:
        """The rows' own windows and the outliers: `sum` [SEGMENT, Dv] and `total` [SEGMENT, 1], relative to `top`."""
        keys, values = (rows[start : start + SEGMENT].view(-1, FINE, rows.shape[1]) for rows in (key, value))
        future = torch.ones(FINE, FINE, dtype=torch.bool).triu(1)
        near = torch.bmm(self.query.view(-1, FINE, self.query.shape[1]), keys.transpose(1, 2))
        near = near.masked_fill_(future, HIDDEN).view(SEGMENT, FINE)
        outliers = self.leaves.outliers
        far = (self.query @ key[outliers].T).masked_fill_(outliers >= start + FINE * window[:, None], HIDDEN)
        self.top = torch.stack([scores.amax(1) for scores in (near, far, self.mass)]).amax(0)[:, None]
        near, far = (scores.sub_(self.top).exp2_() for scores in (near, far))
        self.sum = torch.bmm(near.view(-1, FINE, FINE), values).view(SEGMENT, -1).addmm_(far, value[outliers])
        self.total = near.sum(1, keepdim=True) + far.sum(1, keepdim=True)

    def attend(self, threshold: float) -> tuple[torch.Tensor, int]:
        """(out [SEGMENT, Dv], pairs that were read)."""
        keep = self._chosen(threshold)
        self.mass.view(-1, ROWS, self.mass.shape[1]).masked_fill_(keep[:, None], 0.0)
        self.sum.addmm_(self.mass, self.mean)
        self.total += self.mass.sum(1, keepdim=True)
        out = torch.empty_like(self.sum)
        counts = keep.sum(1).tolist()
        for block, chosen in enumerate(keep.nonzero()[:, 1].split(counts)):  # type: ignore[no-untyped-call]
            rows = slice(block * ROWS, (block + 1) * ROWS)
            out[rows] = self._read(rows, self.index[chosen])
        outliers = len(self.leaves.outliers)
        return out, sum(counts) * LEAF * ROWS + SEGMENT * ((FINE + 1) // 2 + outliers)

    def _chosen(self, threshold: float) -> torch.Tensor:
        """[SEGMENT / ROWS, n] bool: the leaves that each block of rows reads."""
        mean, leaves = self.mean, self.leaves
        total = self.total + self.mass.sum(1, keepdim=True)
        out = torch.addmm(self.sum, self.mass, mean).div_(total)
        norm = out.square().sum(1).view(-1, ROWS)
        blocks = len(norm)
        share = torch.bmm(total.square().reciprocal().view(blocks, 1, ROWS), self.mass.square().view(blocks, ROWS, -1))
        variance = leaves.scorer[self.index, -2]
        uneven = (self.square.view(blocks, ROWS).mean(1, keepdim=True) / LOG2_E * variance).expm1_()
        uneven.clamp_(max=LARGEST_VARIATION)  # of the weights inside a leaf, over their squared mean
        middle = out.view(blocks, ROWS, -1).mean(1)
        away = mean.square().sum(1) - 2 * middle @ mean.T + norm.mean(1, keepdim=True)
        risk = share[:, 0] * (uneven * away.clamp_(min=0) + uneven.clamp(max=LEAF) * leaves.spread[self.index]) / LEAF
        risk /= norm.sum(1, keepdim=True)
        lightest, at = risk.sort(1)
        return torch.zeros_like(risk, dtype=torch.bool).scatter_(1, at, lightest.cumsum(1) > threshold**2)

    def _read(self, rows: slice, leaves: torch.Tensor) -> torch.Tensor:
        """Output of some rows, which read some leaves exactly: [R, Dv]."""
        total, query = self.total[rows], self.query[rows]
        if not len(leaves):
            return self.sum[rows] / total
        keys, values, hidden = (
            table.index_select(0, leaves) for table in (self.leaves.keys, self.leaves.values, self.leaves.hidden)
        )
        scores = torch.addmm(hidden.view(1, -1), query, keys.view(-1, query.shape[1]).T)
        top = torch.maximum(self.top[rows], scores.amax(1, keepdim=True))
        before = (self.top[rows] - top).exp2_()
        weights = scores.sub_(top).exp2_()
        out = torch.addmm(self.sum[rows] * before, weights, values.view(-1, self.sum.shape[1]))
        return out / (total * before + weights.sum(1, keepdim=True))
