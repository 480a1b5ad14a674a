"""Refusals before the work, each with its numbers: what is waiting, what fits, when to come back."""

from __future__ import annotations

from collections.abc import Callable

from service.config import Config
from service.core.options import Priority
from service.errors import FarsightError, Kind, too_large

Queue = tuple[str, Priority, bool]  # whose, of which class, whether of long work
DRAINED = 0.2  # of a full queue, before it takes requests again


class Admission:
    """The limits of one replica; bytes in flight are held between `take` and `give_back`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._inflight_bytes = 0
        self._closed: set[Queue] = set()  # it was full, and drains

    @property
    def inflight_bytes(self) -> int:
        return self._inflight_bytes

    def take(self, size: int, ahead_s: Callable[[], float]) -> None:
        """Reserve `size` body bytes, or refuse: 413 where it can never fit, 429 where it could later.

        Bytes are given back as requests finish, so `ahead_s()` of work is how long the caller should stay away.
        """
        if size > self._config.max_request_bytes:
            raise too_large("request body", size, self._config.max_request_bytes, "bytes")
        if self._inflight_bytes + size > self._config.max_inflight_bytes:
            raise FarsightError(
                Kind.OVERLOADED,
                f"{self._inflight_bytes} bytes of requests are in flight; {size} more are over the limit of "
                f"{self._config.max_inflight_bytes} bytes",
                retry_after_s=ahead_s(),
            )
        self._inflight_bytes += size

    def add(self, size: int) -> None:
        """Count an answer that waits to be sent; it is too late to refuse it."""
        self._inflight_bytes += size

    def give_back(self, size: int) -> None:
        self._inflight_bytes -= size
        assert self._inflight_bytes >= 0, "bug: more bytes given back than taken"

    def check_open(self, ahead_s: float, tenant: str) -> None:
        """Before a body is read: refuse what neither its tenant's queue of short work nor that of long would take.

        Its class is not known yet: it is taken for interactive.
        """
        low_s = (1 - DRAINED) * self._config.max_queue_s
        are_closed = all((tenant, Priority.INTERACTIVE, is_long) in self._closed for is_long in (False, True))
        if are_closed and ahead_s > low_s:
            raise FarsightError(
                Kind.OVERLOADED,
                f"{ahead_s:.3g} predicted device seconds are queued, and a full queue first drains to {low_s:g} s",
                retry_after_s=ahead_s - low_s,
            )

    def admit(
        self,
        predicted_s: float,
        ahead_s: float,
        timeout_s: float,
        spent_s: float = 0.0,
        *,
        queue: Queue,
        own_s: float | None = None,
        asks_only: bool = False,
    ) -> None:
        """Let a request of `predicted_s` queue behind `ahead_s` device seconds, or refuse it now.

        `spent_s` of its timeout went by before: its body was sent and read. `own_s` of what is ahead are in the same
        queue (default: all). A queue that is full is closed until what is ahead has drained by a fifth, so that it is
        known when it takes the next one, and told. An empty one takes any request: of others, what is ahead may never
        end. `asks_only`: nobody queues, an estimate wants to know.
        """
        is_empty = (ahead_s if own_s is None else own_s) <= 0
        limit_s = self._config.max_queue_s
        low_s = (1 - DRAINED) * limit_s
        is_over = ahead_s + predicted_s > limit_s
        # with more than that of its own a request waits for as much as there is
        opens_at_s = max(0.0, low_s - predicted_s)
        if not is_empty and (is_over or (queue in self._closed and ahead_s > opens_at_s)):
            if not asks_only:
                self._closed.add(queue)
            raise FarsightError(
                Kind.OVERLOADED,
                f"{ahead_s:.3g} predicted device seconds are queued; {predicted_s:.3g} more are over the limit of "
                f"{limit_s:g} s, and a full queue first drains to {low_s:g} s",
                # the queue drains one predicted second a second
                retry_after_s=ahead_s - opens_at_s,
            )
        if not asks_only:
            self._closed.discard(queue)
        if spent_s + ahead_s + predicted_s > timeout_s:
            raise FarsightError(
                Kind.DEADLINE,
                f"predicted to finish after {spent_s + ahead_s + predicted_s:.3g} s (sent and read {spent_s:.3g} s, "
                f"queue {ahead_s:.3g} s, work {predicted_s:.3g} s), over the timeout of {timeout_s:.3g} s",
                code="predicted_late",
            )
