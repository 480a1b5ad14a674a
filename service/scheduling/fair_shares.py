"""Shares of the device: start-time fair queuing on device seconds, level by level."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from service.core.options import Priority

# of the device, where both sides have work
CLASS_SHARES = {Priority.INTERACTIVE: 0.9, Priority.BATCH: 0.1}


SHORT_SHARE, LONG_SHARE = 0.75, 0.25


class Waiting(Protocol):
    """What the scheduler must know about a queued request."""

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
    """One share: of the root a class, of a class short or long work, of that a tenant (a leaf, with its queue)."""

    weight: float
    parent: Flow[Item] | None
    virtual_s: float = 0.0  # device seconds over weight; it begins where its siblings are
    clock_s: float = 0.0  # where its own children are
    active: int = 0  # requests that wait or run
    children: dict[Hashable, Flow[Item]] = field(default_factory=dict)
    lines: dict[int, dict[int, Item]] = field(default_factory=dict)  # of a leaf: step of size -> by id, by arrival

    def child(self, name: Hashable, weight: float) -> Flow[Item]:
        if name not in self.children:
            self.children[name] = Flow(weight, self)
        self.children[name].weight = weight  # a tenant's may change
        return self.children[name]

    # what follows runs at every checkpoint of every run: loops, for calls and generators cost twice as much

    def enter(self) -> None:
        one = self
        while (parent := one.parent) is not None:
            if one.active == 0 and one.virtual_s < parent.clock_s:  # nobody saves up a share
                one.virtual_s = parent.clock_s
            one.active += 1
            one = parent
        one.active += 1

    def leave(self) -> None:
        one: Flow[Item] | None = self
        while one is not None:
            one.active -= 1
            one = one.parent

    def charge(self, seconds: float) -> None:
        """A parent's clock follows the child that is most behind its share: who comes now begins there."""
        one = self
        while (parent := one.parent) is not None:
            one.virtual_s += seconds / one.weight
            behind_s = math.inf
            for child in parent.children.values():
                if child.active and child.virtual_s < behind_s:
                    behind_s = child.virtual_s
            if parent.clock_s < behind_s < math.inf:
                parent.clock_s = behind_s
            one = parent

    def leaves(self) -> Iterator[Flow[Item]]:
        """Active leaves, those first that are most behind their share; of equals the greater share."""
        found = [self]
        while found:
            one = found.pop()
            if not one.children:
                yield one
                continue
            active = [child for child in one.children.values() if child.active]
            if len(active) > 1:
                active.sort(key=claim)
                active.reverse()
            found += active


def virtual_s(flow: Flow[Any]) -> float:
    return flow.virtual_s


def claim(flow: Flow[Any]) -> tuple[float, float]:
    return flow.virtual_s, -flow.weight
