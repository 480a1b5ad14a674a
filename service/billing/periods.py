"""Moments as people write them."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(text: str) -> float:
    """Seconds since 1970 of a date or time (UTC where it names no zone), or of such a number. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text) if "-" in text else datetime.fromtimestamp(float(text), UTC)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text[:40]!r} is neither a date, a time nor seconds since 1970") from None


def time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
