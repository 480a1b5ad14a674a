"""Hostile values, and documents with one thing wrong deep inside: most of what is sent must pass the first parse."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

Draw = st.DrawFn

DEEP: Any = [1.0]
for _ in range(60):
    DEEP = [DEEP]
RAW = "\x00raw"  # marks text that goes into the JSON as it is: duplicate keys, NaN, numbers that Python does not write

NUMBERS = (0, 1, -1, 2, True, False, 0.5, -0.0, 1e-320, 1e38, 3.5e38, 1e308, 2**31, 2**32, 2**53 + 1, -(2**63), 2**63)
HUGE = (2**64, 10**40, 2**1100, -(2**62), 4096, 65536, 1_000_001)
TEXTS = (
    "",
    "1",
    "1.0",
    "true",
    "null",
    "nan",
    "auto",
    "sparse",
    "\x00",
    "a\u0301",
    "\u202e",
    "😀" * 40,
    "\ud800",
    "x" * 3000,
)
LISTS = ([], [[]], [None], [[], [1]], [1, "1"], [True, 1], [[1.0], [1.0, 2.0]], DEEP, [0] * 300, [-1, -1], [2**63, 0])
MAPS = (
    {},
    {"": ""},
    {"text": 1},
    {"text": "tired", "more": [1]},
    {"dtype": "float32", "shape": [1], "data": "AACAPw=="},
)
LITERALS = (
    "NaN",
    "-Infinity",
    "1e400",
    "-0",
    "1E2",
    "01",
    '"\\u0000"',
    '"\\ud800\\udc00"',
    '{"a":1,"a":2}',
    "[1,]",
    "1" * 400,
)
VALUES = st.sampled_from([None, *NUMBERS, *HUGE, *TEXTS, *LISTS, *MAPS]) | st.sampled_from(LITERALS).map(RAW.__add__)


def places(node: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside, breadth first, at most `limit`."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    for one in waiting:
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            if len(found) == limit:
                return found
            found.append((one, key))
            waiting.append(one[key])
    return found


@st.composite
def mutated(draw: Draw, document: Any, most: int = 2) -> Any:
    """A copy with up to `most` values, often none, replaced, removed, repeated, renamed or moved."""
    document = copy.deepcopy(document)
    for _ in range(min(most, draw(st.sampled_from((0, 0, 0, 1, 1, 2))))):
        found = places(document)
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "repeat", "rename", "wrap", "swap"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(VALUES))
            case "remove":
                del holder[key]
            case "repeat" if isinstance(holder, list):
                holder.extend([holder[key]] * draw(st.sampled_from((1, 2, 257))))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from((str(key).upper(), f"{key} ", "__proto__", "é", "\ud800", "")))] = (
                    holder.pop(key)
                )
            case "wrap":
                holder[key] = [holder[key]]
            case _:
                other, place = found[draw(st.integers(0, len(found) - 1))]
                if isinstance(other, dict) or (isinstance(place, int) and place < len(other)):
                    holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[place])
    return document


def written(document: Any) -> bytes:
    """JSON of it, raw parts as they are; lone surrogates become escapes."""
    text = json.dumps(document, allow_nan=True)
    for literal in LITERALS:
        text = text.replace(json.dumps(RAW + literal), literal)
    return text.encode()


@st.composite
def damaged(draw: Draw, body: bytes, most: int = 3) -> bytes:
    """A copy with up to `most` bytes changed, cut out or put in."""
    changed = bytearray(body)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(("flip", "insert", "cut", "huge", "end"))):
            case "flip" if at < len(changed):
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                changed[at:at] = draw(st.sampled_from((b"\0", b"\xff\xff\xff\xff", b"\r\n", b'"', b"\xed\xa0\x80")))
            case "huge":
                changed[at : at + 4] = b"\xff\xff\xff\x7f"[: len(changed) - at]
            case "end":
                del changed[max(at, len(changed) - 40) :]
            case _:
                del changed[at : at + draw(st.sampled_from((1, 4, 16)))]
    return bytes(changed)
