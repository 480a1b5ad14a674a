"""Keys in leaves: a few keys that are alike, of one segment, with what can be said about them without reading them.

Alike is what queries cannot tell apart. So keys are first mapped to where the queries of their group vary about the
same in all directions (by half: the full map leaves too little of the directions that few queries look along). There
a leaf's mass is estimated from its centre and one variance, and both from one matrix product for all rows and leaves:
log2 of the mean weight of n keys around c, at a query q in bits, is q.c + |q|^2 ln(2) variance / 2.

Keys stay in their segment, so that what rows see of them is a range of whole segments; inside it they are ordered by
balanced splits along the axis on which they vary most. The keys farthest from the middle of their leaf are kept apart:
all rows read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

import torch
from torch.nn.functional import normalize

from service.attention.geometry import LeafShape
from service.attention.output import Checkpoint

HIDDEN = -1e30  # log2 of the weight of what is not there; finite, so that no difference is NaN
ORDER_AXES = 16  # main axes of the keys that the order looks at
POWER_STEPS = 2
QUERY_STRIDE = 4  # queries that the map is made from
SMALLEST_AXIS = 1e-3  # of the queries' largest mean square: smaller ones are taken for it
MAPPED = 0.5  # 1: queries vary the same in all directions once they are mapped; 0: they are left as they are
OUTLIERS = 0.005  # of all keys
MOST_RAISED = 6.0  # bits, for the mean query: what a leaf's variance may add to its mass, which ends at its best key
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Leaves:
    """The keys of whole segments of one key head, n leaves of them, mapped."""

    shape: LeafShape
    to_queries: torch.Tensor  # [D, D]: maps queries, so that q.k is what it was
    scorer: torch.Tensor  # [n, D + 2]: centre, ln(2) / 2 * variance of one number of a key, log2 of the keys
    positions: torch.Tensor  # [n, size] int64 of their keys
    both: torch.Tensor  # [n, size * (D + 2 + Dv)]: each key, 0 or HIDDEN for one that stands apart, 1, and its value
    mean: torch.Tensor  # [n, Dv] values
    mean_square: torch.Tensor  # [n]: of the mean
    spread: torch.Tensor  # [n]: mean square distance of a value from the mean
    outliers: torch.Tensor  # [m] positions, ascending
    outlier_keys: torch.Tensor  # [m, D]
    outlier_values: torch.Tensor  # [m, Dv]

    def near(self, segments: range) -> slice:
        """Leaves of some segments."""
        per = self.shape.segment // self.shape.size
        return slice(segments.start * per, segments.stop * per)

    def tiles(self, edges: torch.Tensor) -> torch.Tensor:
        """edges [c + 1] of stretches of keys -> [n, c]: how many keys of each leaf are in them."""
        at = torch.searchsorted(edges, self.positions, right=True) - 1
        ones = torch.ones(at.shape, device=at.device)
        return torch.zeros(len(at), len(edges) - 1, device=at.device).scatter_add_(1, at, ones)

    def apart(self, segments: range) -> slice:
        """Outliers of some segments."""
        bounds = torch.tensor([segments.start, segments.stop], device=self.outliers.device) * self.shape.segment
        start, stop = torch.searchsorted(self.outliers, bounds).tolist()
        return slice(start, stop)


def leaves_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: LeafShape, pause: Checkpoint
) -> Leaves:
    """query [g, Lq, D] in bits of the heads that share the keys, key [Lk, D], value [Lk, Dv], float32 -> leaves of the
    whole segments; the last Lk % segment keys are in none."""
    count = len(key) // shape.segment * shape.segment
    some = query[:, ::QUERY_STRIDE].flatten(0, 1)
    to_queries, to_keys = _maps(some)
    key, value = key[:count] @ to_keys, value[:count]
    width, size = key.shape[1], shape.size
    order = ordered(key, shape, pause)
    both = torch.empty(count // size, size, width + 2 + value.shape[1], device=key.device)
    keys, values = both[..., :width], both[..., width + 2 :]
    keys.copy_(key[order].view(keys.shape))
    values.copy_(value[order].view(values.shape))
    apart = _outliers(keys)
    outliers = order[apart].sort().values
    own = torch.ones(count, device=key.device).index_fill_(0, apart, 0.0).view(-1, size)
    both[..., width] = (1.0 - own) * HIDDEN
    both[..., width + 1] = 1.0
    known = own.sum(1, keepdim=True)
    share = (own / known.clamp(min=1))[:, None]
    centre, mean = (torch.bmm(share, rows)[:, 0] for rows in (keys, values))
    variance, spread = (
        (torch.bmm(share, rows.square().sum(2, keepdim=True))[:, 0, 0] - middle.square().sum(1)).clamp_(min=0)
        for rows, middle in ((keys, centre), (values, mean))
    )
    most = MOST_RAISED / (some @ to_queries).square().sum(1).mean().clamp(min=TINY)
    logs = torch.where(known > 0, known.log2(), HIDDEN)
    raised = (log(2) / 2 / width * variance).clamp_(max=most)
    scorer = torch.cat((centre, raised[:, None], logs), 1)
    return Leaves(
        shape, to_queries, scorer, order.view(-1, size), both.flatten(1), mean, mean.square().sum(1), spread,
        outliers, key[outliers], value[outliers],
    )  # fmt: skip


def _maps(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query [n, D] -> [D, D] for queries and [D, D] for keys; their product is the identity."""
    query = query / query.abs().amax().clamp(min=TINY)  # however large or small
    squares, axes = torch.linalg.eigh((query.T @ query / len(query)).nan_to_num())
    squares = squares.clamp(min=max(float(squares[-1]) * SMALLEST_AXIS, TINY))
    factor = (squares / squares.mean()) ** (MAPPED / 2)
    return (axes / factor) @ axes.T, (axes * factor) @ axes.T


def _outliers(keys: torch.Tensor) -> torch.Tensor:
    """keys [n, size, D] of leaves -> places in n * size of those farthest from the middle of their leaf."""
    distance = (keys - keys.mean(1, keepdim=True)).square().sum(2).flatten()
    return distance.topk(ceil(OUTLIERS * len(distance))).indices


def ordered(key: torch.Tensor, shape: LeafShape, pause: Checkpoint) -> torch.Tensor:
    """key [n, D], whole segments -> [n] positions: segments stay where they are, keys of one leaf stand together.

    The last leaf of a segment has its last keys: the rows that follow see them as neighbours.
    """
    middle = key - key.mean(0)
    middle /= middle.abs().amax().clamp(min=TINY)
    axes = torch.linalg.eigh((middle.T @ middle).nan_to_num())[1][:, -ORDER_AXES:]
    rows = middle @ axes
    nodes = torch.arange(len(key), device=key.device).view(-1, shape.segment)
    last = shape.segment - shape.size
    while nodes.shape[1] > shape.size:
        pause()
        own = rows[nodes.flatten()].view(*nodes.shape, -1)
        own -= own.mean(1, keepdim=True)
        axis = own[torch.arange(len(own), device=key.device), own.square().sum(2).argmax(1)]  # towards the farthest key
        for _ in range(POWER_STEPS):
            along = torch.bmm(own, normalize(axis, dim=1)[..., None])
            axis = torch.bmm(along.transpose(1, 2), own)[:, 0]
        along = torch.bmm(own, axis[..., None])[..., 0].masked_fill_(nodes % shape.segment >= last, torch.inf)
        rank = along.argsort(1)
        nodes = nodes.gather(1, rank).view(-1, nodes.shape[1] // 2)
    return nodes.flatten()
