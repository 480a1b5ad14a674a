"""How many query-key pairs a mask leaves, in closed form; no torch, so that the planner can count too."""

from __future__ import annotations

TILE, MOST_TILES = 128, 256  # of a map of blocks: the shortest tile, and the most tiles of an axis


def visible_pairs(
    query_length: int,
    valid_length: int,
    *,
    is_causal: bool = False,
    causal_alignment: str | int = "bottom_right",
    window: tuple[int, int] | None = None,
) -> int:
    """Pairs of one head and sequence that causality, window and length leave; causal is counted as causal.

    An `attn_mask` is not looked into: it can only take pairs away.
    """
    match causal_alignment:
        case int(given):
            offset = given
        case "top_left":
            offset = 0
        case "bottom_right":
            offset = valid_length - query_length
        case _:
            raise ValueError(f"causal_alignment: {causal_alignment!r}")
    left, right = window or (-1, -1)
    if is_causal:
        right = 0
    upper = query_length * valid_length if right < 0 else _ramp(offset + right + 1, query_length, valid_length)
    lower = 0 if left < 0 else _ramp(offset - left, query_length, valid_length)
    return upper - lower


def tile_length(length: int, most: int = MOST_TILES) -> int:
    """Of the tiles that an axis of a map of blocks is cut into: a power of two, so that what is read in blocks fits."""
    size = TILE
    while size * most < length:
        size *= 2
    return size


def _ramp(first: int, count: int, cap: int) -> int:
    """Sum of min(max(first + i, 0), cap) for i in 0..count-1."""
    start = min(max(-first, 0), count)  # leading rows that are below zero
    end = min(max(cap - first, start), count)  # from here on every row is at the cap
    rising = end - start
    return rising * (first + start) + rising * (rising - 1) // 2 + (count - end) * cap
