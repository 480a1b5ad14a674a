"""Moments as people write them."""

from __future__ import annotations

from datetime import UTC, datetime

LAST_S = 250_000_000_000.0  # in the year 9892; later ones cannot be written


def moment(text: str) -> float:
    """Seconds since 1970 of a date or time (UTC where it names no zone), or of such a number. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text) if "-" in text else datetime.fromtimestamp(float(text), UTC)
        seconds = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        if 0 <= seconds < LAST_S:
            return seconds
        raise ValueError
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text[:40]!r} is neither a date nor a time since 1970, nor seconds since then") from None


def time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
