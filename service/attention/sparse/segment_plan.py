"""How one segment is attended: by blocks of neighbours, by leaves of keys that are alike, or exactly.

Where neighbours are alike, as in inputs with topics, blocks read less for less. Where they are not, as in most heads of
real models, leaves do. A look at one head says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from service.attention.block_map import BlockMap, seen
from service.attention.inputs import AttentionInputs
from service.attention.output import AttentionOutput, Checkpoint, no_checkpoint
from service.attention.segments import Segment
from service.attention.sparse import attend as sparse
from service.attention.sparse.by_leaf import LeafAttention, bytes_of, tiles_of
from service.attention.sparse.selection import Selection, SelectionSettings, predicted_density, select

BLOCKS_UP_TO = 0.2  # density: below, keys that are alike are neighbours already, and need no order
# of max_error: what leaves are chosen for. The audit's upper limit must fit beside it, and of a long input the pilot
# sees a smaller share. Measured on a real model's layers: loadtests/results/real-attention-*.json
AIM, LONG_AIM, LONG = 0.7, 0.5, 2**14


def part_of(max_error: float, segment: Segment) -> float:
    """What leaves are chosen for where the audit must not find more than max_error."""
    return max_error * (AIM if segment.key.shape[2] < LONG else LONG_AIM)


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """What will be run."""

    pairs: float  # predicted
    visible: int
    exact: frozenset[tuple[int, int]] = frozenset()  # sequences and heads that are left to the caller
    reason: str = ""  # why those are
    run: Callable[[BlockMap | None], AttentionOutput] | None = None  # None: everything is left to the caller
    selection: Selection | None = None  # by blocks
    pays: bool = False  # whatever its density


@dataclass(frozen=True, slots=True)
class SegmentPlanner:
    """Plans segments, and plans them again for a smaller error."""

    checkpoint: Checkpoint | None
    prepared: dict[int, LeafAttention] = field(default_factory=dict)  # by segment

    def plan(self, segment: Segment, inputs: AttentionInputs, settings: SelectionSettings, aim: float) -> SegmentPlan:
        """By leaves for an error of `aim`, or by blocks with the settings. `inputs` are the segment's."""
        visible = segment.visible_pairs
        if id(segment) not in self.prepared:
            pause = self.checkpoint or no_checkpoint
            held = sum(bytes_of(leaves.inputs) for leaves in self.prepared.values())
            parts = tiles_of(inputs, held)
            if not parts or predicted_density(inputs, settings, pause) <= BLOCKS_UP_TO:
                return self.by_blocks(inputs, settings)
            prepared = LeafAttention.of(inputs, parts, aim, settings.max_density, pause)
            if prepared is None:
                return SegmentPlan(visible, visible)
            self.prepared[id(segment)] = prepared
        leaves = self.prepared[id(segment)]
        choices = leaves.choose(aim, settings.max_density)
        heads = inputs.query.shape[1]
        exact = frozenset(divmod(head, heads) for head, choice in enumerate(choices) if choice is None)
        share = sum(1.0 if choice is None else choice.share for choice in choices) / len(choices)
        return SegmentPlan(
            share * visible, visible, exact, "no cheaper by leaves",
            lambda into: leaves.attend(choices, self.checkpoint or no_checkpoint, into), pays=len(exact) < len(choices),
        )  # fmt: skip

    def by_blocks(self, inputs: AttentionInputs, settings: SelectionSettings) -> SegmentPlan:
        arguments = *inputs.tensors, inputs.mask
        scoring, checkpoint = inputs.scoring, self.checkpoint
        selection = select(*arguments, settings, scoring=scoring, checkpoint=checkpoint)

        def run(into: BlockMap | None) -> AttentionOutput:
            if into is not None:
                _draw(selection, into)
            return sparse.attend(*arguments, selection, scoring=scoring, checkpoint=checkpoint)

        reason = f"over density {settings.max_density}"
        return SegmentPlan(selection.pairs, selection.visible, selection.exact, reason, run, selection)


def _draw(selection: Selection, into: BlockMap) -> None:
    """What is read of a selection; within a block its pairs spread evenly."""
    layout = selection.layout
    rows = torch.cat((layout.rows[:, 0], into.rows[-1:]))
    blocks = torch.arange(layout.k_blocks + 1, device=rows.device).mul_(layout.block_size).clamp_(max=layout.key_length)
    keys = into.keys.clamp(max=layout.key_length)
    block = (keys // layout.block_size).clamp(max=layout.k_blocks - 1)
    within = (keys - blocks[block]) / (blocks[block + 1] - blocks[block])
    for at in range(layout.q_blocks):
        count = int(rows[at + 1] - rows[at])
        pairs = seen(layout.lo[at, :count], layout.hi[at, :count], blocks).sum(0)
        before = pad((selection.keep[:, :, at] * pairs).cumsum(2), (1, 0))
        upto = before[..., block] + within * (before[..., block + 1] - before[..., block])
        into.add(upto.diff(dim=2)[:, :, None], rows[at : at + 2])
