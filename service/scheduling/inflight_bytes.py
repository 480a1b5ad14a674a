"""Body bytes that a replica holds: counted as they arrive, limited, and given back when a request is over."""

from __future__ import annotations

from collections.abc import Callable

from service.config import Config
from service.errors import FarsightError, Kind, too_large


class InFlightBytes:
    """All bodies, and answers that wait to be sent, of one replica.

    Bytes are given back as requests finish, so a refused caller should retry after `ahead_s()` seconds of work.
    """

    def __init__(self, config: Config, ahead_s: Callable[[], float]) -> None:
        self.max_request_bytes, self.max_bytes = config.max_request_bytes, config.max_inflight_bytes
        self.ahead_s = ahead_s
        self.total = 0


class HeldBytes:
    """Bytes of one request, counted while this context is open."""

    def __init__(self, inflight: InFlightBytes, size: int = 0) -> None:
        self._inflight, self._size = inflight, size

    def take(self, size: int) -> None:
        """Count `size` more. Raises FarsightError: 413 if they can never fit, 429 if they could later."""
        inflight = self._inflight
        if size > inflight.max_request_bytes:
            raise too_large("request body", size, inflight.max_request_bytes, "bytes")
        if inflight.total + size > inflight.max_bytes:
            raise FarsightError(
                Kind.OVERLOADED,
                f"{inflight.total} bytes of requests are in flight; {size} more are over the limit of "
                f"{inflight.max_bytes} bytes",
                retry_after_s=inflight.ahead_s(),
            )
        inflight.total += size
        self._size += size

    def add(self, size: int) -> None:
        """Count an answer that waits to be sent; it is too late to refuse it."""
        self._inflight.total += size
        self._size += size

    def move(self) -> HeldBytes:
        """Everything held, in a new context; this one holds nothing any more."""
        size, self._size = self._size, 0
        return HeldBytes(self._inflight, size)

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._inflight.total -= self._size
        self._size = 0
