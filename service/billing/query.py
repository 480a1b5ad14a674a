"""Parameters of a ledger query as text: points in time and the names to group by."""

from __future__ import annotations

from datetime import UTC, datetime

HOUR_S, DAY_S = 3600, 86_400
WIDTHS_S = {"hour": HOUR_S, "day": DAY_S}
KEYS = ("tenant", "endpoint", "model", "plan", "outcome")
GROUPS = (*KEYS, *WIDTHS_S)
LAST_S = 250_000_000_000.0  # in the year 9892; datetime cannot show much later times


def moment(text: str) -> float:
    """Seconds since 1970 of a date or time (UTC without a zone) or of a number of seconds. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text) if "-" in text else datetime.fromtimestamp(float(text), UTC)
        seconds = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        if 0 <= seconds < LAST_S:
            return seconds
        raise ValueError
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"expected a date, a time or seconds since 1970, got {text[:40]!r}") from None


def time_of(seconds: float) -> str:
    """ISO 8601 in UTC of seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def group_names(text: str) -> tuple[str, ...]:
    """Names of `GROUPS` separated by commas. Raises ValueError."""
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"group_by: expected any of {', '.join(GROUPS)}, got {name[:32]!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"group_by: expected each name once, got {','.join(names)!r}")
    return names
