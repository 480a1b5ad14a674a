"""What runs next: highest response ratio first, batches of one key filled by predicted seconds.

Pure and clock-free: every call is given `now_s`. Owned by the event loop, so it needs no lock.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from service.core import Priority

# A batch-class request competes with a tenth of its response ratio: interactive work goes first,
# yet the ratio grows with waiting, so nothing starves.
BATCH_SHARE = 0.1


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


Item = TypeVar("Item", bound=Waiting)


def response_ratio(item: Waiting, now_s: float) -> float:
    """(wait + predicted) / predicted, weighted by class: short work first, and it rises while work waits."""
    ratio = (now_s - item.arrived_s + item.predicted_s) / item.predicted_s
    return ratio if item.priority is Priority.INTERACTIVE else ratio * BATCH_SHARE


class Scheduler(Generic[Item]):
    """The queue of one device."""

    def __init__(self, target_slice_s: float, max_batch_requests: int = 256) -> None:
        self._target_slice_s = target_slice_s
        self._max_batch_requests = max_batch_requests
        self._waiting: dict[int, Item] = {}  # by id(item), in order of arrival
        self._queued_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def queued_s(self) -> float:
        """Predicted device seconds that wait."""
        return self._queued_s if self._waiting else 0.0

    def add(self, item: Item) -> None:
        self._waiting[id(item)] = item
        self._queued_s += item.predicted_s

    def discard(self, item: Item) -> bool:
        """Take a cancelled or late request out; False where it is no longer queued."""
        found = self._waiting.pop(id(item), None)
        if found is None:
            return False
        self._queued_s -= found.predicted_s
        return True

    def next_batch(self, now_s: float) -> list[Item]:
        """The first request by response ratio, then others of its key until the slice is full; [] when idle.

        What a batch pays once (`shared_s`) counts once.
        """
        if not self._waiting:
            return []
        first = max(self._waiting.values(), key=lambda item: response_ratio(item, now_s))
        batch, filled_s = [first], first.predicted_s
        same_key = [item for item in self._waiting.values() if item.key == first.key and item is not first]
        for item in sorted(same_key, key=lambda item: response_ratio(item, now_s), reverse=True):
            more_s = item.predicted_s - item.shared_s
            if len(batch) >= self._max_batch_requests or filled_s + more_s > self._target_slice_s:
                break
            batch.append(item)
            filled_s += more_s
        for item in batch:
            self.discard(item)
        return batch
