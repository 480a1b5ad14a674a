"""What may be asked of the ledger, as people write it: a time, and what to sum by."""

from __future__ import annotations

from datetime import UTC, datetime

HOUR_S, DAY_S = 3600, 86_400
WIDTHS_S = {"hour": HOUR_S, "day": DAY_S}  # of time that is summed
KEYS = ("tenant", "endpoint", "model", "plan", "outcome")
GROUPS = (*KEYS, *WIDTHS_S)
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


def group_names(text: str) -> tuple[str, ...]:
    """Any of `GROUPS`, with commas. Raises ValueError."""
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"group_by: {name[:32]!r} is none of {', '.join(GROUPS)}")
    if len(set(names)) != len(names):
        raise ValueError("group_by: a name is there twice")
    return names
