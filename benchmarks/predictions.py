"""Accuracy of the planner on this device: predicted and actual seconds for shapes that calibration has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch

from service.attention.dispatch import attend
from service.attention.masks import mask_of
from service.attention.output import no_checkpoint
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.attention.synthetic import InputShape, structured
from service.config import Config
from service.core.options import AttentionOptions
from service.core.plan import PlanKind
from service.core.request import AttentionShape
from service.device import timed
from service.planning.attention_plan import attention_candidates, plan_attention
from service.planning.device_profile import DeviceProfile

MAX_LENGTH = {PlanKind.DENSE: 16384, PlanKind.CHUNKED: 16384, PlanKind.SPARSE: 32768}
WITHIN = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """One shape: predicted and actual seconds of every plan, and what the planner chose."""

    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    dtype: str
    is_causal: bool
    predicted_s: dict[str, float]
    actual_s: dict[str, float]
    chosen: str

    @property
    def regret(self) -> float:
        """Extra time of the chosen plan over the fastest measured plan, as a share."""
        return self.actual_s[self.chosen] / min(self.actual_s.values()) - 1


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares of predictions within 25 % of the actual time, by plan and for the chosen plans; mean regret over the
    shapes for which all three plans were measured."""

    shapes: int
    within: dict[str, float]
    chosen_within: float
    mean_regret: float
    rows: list[Row]


def shapes(count: int, seed: int) -> list[tuple[AttentionShape, bool]]:
    """(shape, is_causal) of a held-out mix: log-uniform lengths 64 to 32K, self and cross, grouped heads, head_dim 32
    to 128."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = int(2 ** draw.uniform(6, 15))
        kv_heads, group = draw.choice([(1, 1), (2, 1), (4, 1), (2, 4), (8, 1)])
        if length > 8192:
            kv_heads, group = draw.choice([(1, 1), (1, 2)])
        queries = length if draw.random() < 0.8 else max(1, length // draw.choice([2, 8]))
        width = draw.choice([32, 64, 64, 128])
        dtype = draw.choice(["float32", "bfloat16"])
        heads = kv_heads * group
        shape = AttentionShape(1, heads, kv_heads, queries, length, width, width, dtype)
        found.append((shape, draw.random() < 0.6))
    return found


def run(
    profile: DeviceProfile, config: Config, device: torch.device, count: int, rounds: int, done: Callable[[int], None]
) -> Figures:
    """Measure `count` shapes; `done` is called with the number of measured shapes."""
    rows = []
    for index, (shape, is_causal) in enumerate(shapes(count, seed=12345)):
        rows.append(_row(shape, is_causal, profile, config, device, rounds))
        done(index + 1)
    ratios = {
        kind: [row.predicted_s[kind] / row.actual_s[kind] for row in rows if kind in row.actual_s] for kind in PlanKind
    }
    chosen = [row.predicted_s[row.chosen] / row.actual_s[row.chosen] for row in rows]
    return Figures(
        shapes=len(rows),
        within={str(kind): _share_within(found) for kind, found in ratios.items()},
        chosen_within=_share_within(chosen),
        mean_regret=mean(row.regret for row in rows if len(row.actual_s) == len(PlanKind)),
        rows=rows,
    )


def _share_within(ratios: list[float]) -> float:
    return mean(abs(ratio - 1) <= WITHIN for ratio in ratios)


def _row(
    shape: AttentionShape,
    is_causal: bool,
    profile: DeviceProfile,
    config: Config,
    device: torch.device,
    rounds: int,
) -> Row:
    options = AttentionOptions(is_causal=is_causal)
    dtype = getattr(torch, shape.dtype)
    drawn = structured(InputShape(1, shape.heads, shape.kv_heads, shape.key_length, shape.head_dim), dtype, seed=1)
    query, key, value = (tensor.to(device) for tensor in drawn)
    tensors = query[:, :, shape.key_length - shape.query_length :], key, value
    chosen = plan_attention(shape, options, profile, config)
    kinds = [kind for kind in PlanKind if shape.key_length <= MAX_LENGTH[kind] or kind is chosen.kind]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    mask, bound = mask_of(options), ErrorBound(1.0, PlanKind.DENSE, config.epsilon, max_density=None)
    with torch.inference_mode():
        for _ in range(rounds + 1):  # interleaved, so that other load on the machine affects all of them
            for kind in kinds:
                work: Callable[[], object] = partial(attend, *tensors, kind, mask, checkpoint=no_checkpoint)
                if kind is PlanKind.SPARSE:
                    work = partial(attend_with_error_bound, *tensors, mask, bound, checkpoint=no_checkpoint)
                times[kind].append(timed(work, device)[1])
    priced = attention_candidates(shape, options, profile, config)
    predicted = {str(kind): priced[kind].predicted_s for kind in kinds}
    actual = {str(kind): median(found[1:]) for kind, found in times.items()}
    sizes = shape.heads, shape.kv_heads, shape.query_length, shape.key_length, shape.head_dim, shape.dtype
    return Row(*sizes, is_causal, predicted, actual, str(chosen.kind))
