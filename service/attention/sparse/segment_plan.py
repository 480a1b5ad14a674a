"""How one segment is attended: by blocks of neighbours, by leaves of keys that are alike, or exactly.

Where neighbours are alike, as in inputs with topics, blocks read less for less. Where they are not, as in most heads of
real models, leaves do. A look at one head says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """What will be run."""

    pairs: float  # predicted
    visible: int
    exact: frozenset[tuple[int, int]] = frozenset()  # sequences and heads that are left to the caller
    reason: str = ""  # why those are
    run: Callable[[], AttentionOutput] | None = None  # None: everything is left to the caller
    selection: Selection | None = None  # by blocks
    pays: bool = False  # whatever its density


@dataclass(frozen=True, slots=True)
class SegmentPlanner:
    """Plans segments, and plans them again for a smaller error."""

    checkpoint: Checkpoint | None
    prepared: dict[int, LeafAttention] = field(default_factory=dict)  # by segment

    def plan(
        self, segment: Segment, inputs: AttentionInputs, settings: SelectionSettings, max_error: float, tightness: float
    ) -> SegmentPlan:
        """By leaves for max_error, times tightness, or by blocks with the settings. `inputs` are the segment's."""
        visible, aim = segment.visible_pairs, max_error * (AIM if segment.key.shape[2] < LONG else LONG_AIM)
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
        choices = leaves.choose(aim * tightness, settings.max_density)
        heads = inputs.query.shape[1]
        exact = frozenset(divmod(head, heads) for head, choice in enumerate(choices) if choice is None)
        share = sum(1.0 if choice is None else choice.share for choice in choices) / len(choices)
        return SegmentPlan(
            share * visible, visible, exact, "no cheaper by leaves",
            lambda: leaves.attend(choices, self.checkpoint or no_checkpoint), pays=len(exact) < len(choices),
        )  # fmt: skip

    def by_blocks(self, inputs: AttentionInputs, settings: SelectionSettings) -> SegmentPlan:
        arguments = *inputs.tensors, inputs.mask
        scoring, checkpoint = inputs.scoring, self.checkpoint
        selection = select(*arguments, settings, scoring=scoring, checkpoint=checkpoint)
        return SegmentPlan(
            selection.pairs, selection.visible, selection.exact, f"over density {settings.max_density}",
            lambda: sparse.attend(*arguments, selection, scoring=scoring, checkpoint=checkpoint), selection,
        )  # fmt: skip
