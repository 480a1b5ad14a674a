"""Shares of the device: start-time fair queuing on device seconds, level by level."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from service.core.options import Priority

# of the device, while both sides have work
CLASS_SHARES = {Priority.INTERACTIVE: 0.9, Priority.BATCH: 0.1}
SHORT_SHARE, LONG_SHARE = 0.75, 0.25


class Waiting(Protocol):
    """What the scheduler must know about a queued request. Times are seconds."""

    @property
    def key(self) -> Hashable: ...
    @property
    def predicted_s(self) -> float: ...
    @property
    def shared_s(self) -> float: ...
    @property
    def arrived_s(self) -> float: ...
    @property
    def priority(self) -> Priority: ...
    @property
    def tenant(self) -> str: ...
    @property
    def peak_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Waiting)


@dataclass(slots=True, eq=False)
class Flow(Generic[Item]):
    """One share of the device: a class, or in it short or long work, or in that a tenant (a leaf, with its queue)."""

    weight: float
    parent: Flow[Item] | None
    virtual_s: float = 0.0  # device seconds over weight; starts where its siblings are
    clock_s: float = 0.0  # where its children are
    active: int = 0  # requests that wait or run
    children: dict[Hashable, Flow[Item]] = field(default_factory=dict)
    lines: dict[int, dict[int, Item]] = field(
        default_factory=dict
    )  # of a leaf: size class -> by id, in order of arrival

    def child(self, name: Hashable, weight: float) -> Flow[Item]:
        if name not in self.children:
            self.children[name] = Flow(weight, self)
        self.children[name].weight = weight  # a tenant's weight may change
        return self.children[name]

    # the following run at every checkpoint of every run: loops, because calls and generators cost twice as much

    def enter(self) -> None:
        """A request of this share waits or runs."""
        flow = self
        while (parent := flow.parent) is not None:
            if flow.active == 0 and flow.virtual_s < parent.clock_s:  # an unused share is not saved up
                flow.virtual_s = parent.clock_s
            flow.active += 1
            flow = parent
        flow.active += 1

    def leave(self) -> None:
        """It is done."""
        flow: Flow[Item] | None = self
        while flow is not None:
            flow.active -= 1
            flow = flow.parent

    def charge(self, seconds: float) -> None:
        """Use `seconds` of the device. A parent's clock follows its child most behind: new children begin there."""
        flow = self
        while (parent := flow.parent) is not None:
            flow.virtual_s += seconds / flow.weight
            behind_s = math.inf
            for child in parent.children.values():
                if child.active and child.virtual_s < behind_s:
                    behind_s = child.virtual_s
            if parent.clock_s < behind_s < math.inf:
                parent.clock_s = behind_s
            flow = parent

    def leaves(self) -> Iterator[Flow[Item]]:
        """Active leaves, those most behind their share first; of equals the greater share."""
        found = [self]
        while found:
            flow = found.pop()
            if not flow.children:
                yield flow
                continue
            active = [child for child in flow.children.values() if child.active]
            if len(active) > 1:
                active.sort(key=claim)
                active.reverse()
            found += active


def virtual_s(flow: Flow[Any]) -> float:
    return flow.virtual_s


def claim(flow: Flow[Any]) -> tuple[float, float]:
    return flow.virtual_s, -flow.weight
