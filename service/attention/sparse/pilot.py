"""A few blocks of rows computed exactly, for what each head's thresholds would read and get wrong.

Heads differ by a factor of ten in what they must read for one error, and a leaf's estimated risk is right in its
order, not in its size. So nothing is believed of it but the order: for each head and share of leaves read, the pilot
knows the error that its rows would have had, and `choose` picks the shares that cost least together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from service.attention.geometry import PILOT_ROWS, PILOT_TILES
from service.attention.output import Checkpoint
from service.attention.sparse.key_group import KeyGroup
from service.attention.sparse.tiles import Tile

SHARES = (0.0, 0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
FAITHS = (1.0, 0.5)  # in a leaf's variance: how much of it raises the leaf's estimated mass
FEWEST = 4  # tiles
BISECTIONS = 60
TAIL = 1.0  # of the largest error of a head's rows, added to their sum: what few rows show of many is too little
# of a head, relative to exact attention: scoring all leaves, and reading a key
SCORING, READING = 0.15, 1.4


@dataclass(frozen=True, slots=True)
class Choice:
    """What one head does."""

    faith: float
    threshold: float
    share: float  # of the leaves that it will read


@dataclass(frozen=True, slots=True)
class Curve:
    """What the pilot's rows of one head would have got wrong, for each way to choose."""

    choices: Sequence[Choice]
    errors: Sequence[float]  # squared, summed over the rows
    norm: float  # the same of the exact output


def curves(group: KeyGroup, tiles: Sequence[Tile], pause: Checkpoint) -> list[Curve]:
    """Of each head of a group. `tiles`: some of those with segments, evenly spread."""
    blocks = []
    for tile in tiles:
        pause()
        blocks.append(_Block.of(group, tile))
    norms = torch.stack([block.norm for block in blocks]).sum(0).tolist()
    choices: list[list[Choice]] = [[] for _ in range(group.heads)]
    errors: list[list[float]] = [[] for _ in range(group.heads)]
    for index, faith in enumerate(FAITHS):
        pooled = torch.cat([block.risks[index] for block in blocks], 1).sort(1, descending=True).values
        at = torch.tensor([min(int(share * pooled.shape[1]), pooled.shape[1] - 1) for share in SHARES])
        thresholds = pooled[:, at.to(pooled.device)]  # [g, shares]
        pause()
        error = torch.cat([block.errors(index, thresholds) for block in blocks], 2)
        error = error.sum(2) + TAIL * error.amax(2)
        for head in range(group.heads):
            pairs = zip(thresholds[head].tolist(), SHARES, strict=True)
            choices[head] += [Choice(faith, threshold, share) for threshold, share in pairs]
            errors[head] += error[head].tolist()
    return [Curve(*of_head) for of_head in zip(choices, errors, norms, strict=True)]


@dataclass(frozen=True, slots=True)
class _Block:
    """n rows of one block, all heads of a group, and c leaves; masses relative to the same power of two for all."""

    leaf_means: torch.Tensor  # [c, Dv]
    risks: list[torch.Tensor]  # [g, c] for each faith
    estimates: list[torch.Tensor]  # [g, n, c] masses for each faith
    masses: torch.Tensor  # [g, n, c], true ones
    sums: torch.Tensor  # [g, c, n * Dv]: true weighted values
    out: torch.Tensor  # [g, 1, n, Dv], exact
    total: torch.Tensor  # [g, 1, n, 1], exact mass of all keys

    @classmethod
    def of(cls, group: KeyGroup, tile: Tile) -> _Block:
        """The middle block of a tile, and every few of its rows."""
        leaves, size, block = group.leaves, group.leaves.shape.size, group.block
        start = tile.rows.start + (tile.rows.stop - tile.rows.start) // block // 2 * block
        rows, step = slice(start, start + block), block // PILOT_ROWS

        def some(x: torch.Tensor) -> torch.Tensor:
            """[g * block, x] -> [g, n, x]."""
            return x.view(group.heads, block, -1)[:, step // 2 :: step]

        risks, expected = [], []
        for faith in FAITHS:
            weighed = group.masses(rows, tile.segments, group.query.new_full((group.heads,), faith))
            risks.append(group.risks(rows, weighed))
            expected.append((some(weighed.estimate).clone(), some(weighed.top)))
        query = group.query[:, rows][:, step // 2 :: step]
        query = torch.cat((query, torch.ones_like(query[..., :1]), torch.zeros_like(query[..., :1])), 2)
        both = leaves.both[weighed.leaves].view(-1, size, leaves.both.shape[1] // size)
        scores = query.flatten(0, 1) @ both[..., : query.shape[2]].flatten(0, 1).T
        top = torch.maximum(some(weighed.top), scores.amax(1).view(*query.shape[:2], 1))
        weights = scores.sub_(top.view(-1, 1)).exp2_().view(len(scores), -1, size)
        masses = weights.sum(2).view(*query.shape[:2], -1)
        sums = torch.bmm(weights.transpose(0, 1), both[..., query.shape[2] :])
        before = (some(weighed.top) - top).exp2()
        total = some(weighed.exact_total) * before + masses.sum(2, keepdim=True)
        out = (some(weighed.exact) * before + sums.sum(0).view(*query.shape[:2], -1)) / total
        estimates = [estimate * (over - top).exp2() for estimate, over in expected]
        by_head = sums.view(len(sums), group.heads, -1).transpose(0, 1)
        return cls(leaves.mean[weighed.leaves], risks, estimates, masses, by_head, out[:, None], total[:, None])

    @property
    def norm(self) -> torch.Tensor:
        """[g]: squared, of the exact output."""
        return self.out.square().sum((1, 2, 3))

    def errors(self, faith: int, thresholds: torch.Tensor) -> torch.Tensor:
        """thresholds [g, t] -> [g, t, n] squared errors."""
        estimate = self.estimates[faith]
        unread = (self.risks[faith][:, None] <= thresholds[..., None]).to(estimate.dtype)  # [g, t, c]
        stand_in = (unread[:, :, None] * estimate[:, None]) @ self.leaf_means  # [g, t, n, Dv]
        left_out = torch.bmm(unread, self.sums).view(stand_in.shape)
        excess = torch.bmm(unread, (estimate - self.masses).transpose(1, 2))[..., None]
        return ((stand_in - left_out - excess * self.out) / (self.total + excess)).square().sum(3)


def pilots(tiles: Sequence[Tile]) -> list[Tile]:
    """Some of the tiles with segments, evenly spread."""
    far = [tile for tile in tiles if tile.segments]
    count = min(len(far), max(FEWEST, min(PILOT_TILES, len(far) // 4)))
    return [far[int((at + 0.5) * len(far) / count)] for at in range(count)]


def choose(curves: Sequence[Curve], max_error: float, max_share: float | None) -> list[Choice | None]:
    """The cheapest choice of each head that keeps the relative error of all of them together under max_error.

    None: exact is cheaper than anything that reads at most max_share. If that is None, no head is exact.
    """
    allowed = max_error**2 * sum(curve.norm for curve in curves)
    most = inf if max_share is None else max_share
    costs = [SCORING + READING * share if share <= most else inf for share in SHARES] * len(FAITHS)
    exact_cost = inf if max_share is None else 1.0

    def chosen(price: float) -> tuple[list[int | None], float]:
        """For a price of a squared error: the cheapest of each head, and their error together."""
        found: list[int | None] = []
        total = 0.0
        for curve in curves:
            worth = [cost + price * error for cost, error in zip(costs, curve.errors, strict=True)]
            best = min(range(len(worth)), key=worth.__getitem__)
            if not worth[best] < exact_cost and max_share is not None:  # NaN as well
                found.append(None)
            else:
                found.append(best)
                total += curve.errors[best]
        return found, total

    low, high = 1e-30, 1e30
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        if chosen(price)[1] <= allowed:
            high = price
        else:
            low = price
    return [None if at is None else curve.choices[at] for curve, at in zip(curves, chosen(high)[0], strict=True)]
