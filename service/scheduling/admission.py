"""Refusals before the work, each with its numbers: what is waiting, what fits, when to come back."""

from __future__ import annotations

from service.config import Config
from service.core.options import Priority
from service.errors import FarsightError, Kind

Queue = tuple[str, Priority, bool]  # tenant, class, whether of long work
DRAINED = 0.2  # share of a full queue that drains before it accepts requests again


class Admission:
    """The queue limits of one replica."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._closed: set[Queue] = set()  # were full, and drain

    def check_open(self, ahead_s: float, tenant: str) -> None:
        """Before a body is read: raise FarsightError (429) if neither its tenant's queue of short work nor that of long
        work would accept it. Its class is not known yet and assumed to be interactive."""
        low_s = (1 - DRAINED) * self._config.max_queue_s
        are_closed = all((tenant, Priority.INTERACTIVE, is_long) in self._closed for is_long in (False, True))
        if are_closed and ahead_s > low_s:
            raise FarsightError(
                Kind.OVERLOADED,
                f"{ahead_s:.3g} predicted device seconds are queued; queue full, accepting again below {low_s:g} s",
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
        tenant_s: float | None = None,
        asks_only: bool = False,
    ) -> None:
        """Let a request of `predicted_s` queue behind `ahead_s` device seconds, or raise FarsightError (429, 504).

        A full queue stays closed until a fifth of what is ahead has drained, so `Retry-After` can be computed. An empty
        queue accepts any request: what is ahead belongs to others, and may never end.

        Args:
            predicted_s: of the request, on this device.
            ahead_s: predicted seconds before it could start.
            timeout_s: the time from its first byte to its answer.
            spent_s: of that time, what sending and reading the body took.
            queue: the one that it would join.
            tenant_s: seconds of `ahead_s` in that queue; default all.
            asks_only: for an estimate; nothing is queued.
        """
        is_empty = (ahead_s if tenant_s is None else tenant_s) <= 0
        limit_s = self._config.max_queue_s
        low_s = (1 - DRAINED) * limit_s
        is_over = ahead_s + predicted_s > limit_s
        # a request longer than that waits until the queue is empty
        opens_at_s = max(0.0, low_s - predicted_s)
        if not is_empty and (is_over or (queue in self._closed and ahead_s > opens_at_s)):
            if not asks_only:
                self._closed.add(queue)
            raise FarsightError(
                Kind.OVERLOADED,
                f"{ahead_s:.3g} predicted device seconds are queued; {predicted_s:.3g} more are over the limit of "
                f"{limit_s:g} s; queue full, accepting again below {low_s:g} s",
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
