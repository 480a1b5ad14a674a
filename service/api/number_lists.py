"""Nested lists of numbers, as JSON has them, into arrays.

Types, depth and lengths are checked before NumPy is called: it would make room for the longest string at every place,
and for every list of another length an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from service.errors import invalid

BOOLS: frozenset[type] = frozenset({bool})
INTEGERS: frozenset[type] = frozenset({int})
NUMBERS: frozenset[type] = frozenset({int, float})
MAX_DEPTH = 8


def array_of(name: str, value: Any, accepted: Mapping[frozenset[type], type], expected: str) -> np.ndarray[Any, Any]:
    """The array of nested lists.

    Args:
        name: of the parameter, for errors.
        value: the lists, empty ones too.
        accepted: for the types that all elements may have, the NumPy type of the array; an empty array gets the first.
        expected: what elements are, for errors.

    Raises INVALID: other types, lists of unequal lengths, too many levels, an integer beyond the NumPy type.
    """
    if not isinstance(value, list):
        raise invalid(f"{name}: {expected}", param=name)
    found = _element_types(name, value)
    for types, dtype in accepted.items():
        if found <= types:
            try:
                return np.array(value, dtype=dtype)
            except OverflowError:
                raise invalid(
                    f"{name}: an integer is outside the range of {np.dtype(dtype).name.upper()}", param=name
                ) from None
    raise invalid(f"{name}: {expected}", param=name)


def _element_types(name: str, value: list[Any]) -> set[type]:
    """Types of the elements that are not lists; none of an empty array."""
    lists = [value]  # of one depth
    for _ in range(MAX_DEPTH):
        if len(set(map(len, lists))) > 1:
            raise invalid(f"{name}: expected nested lists of one shape, got ragged ones", param=name)
        types: set[type] = set().union(*(map(type, one) for one in lists))
        if list not in types:
            return types
        if len(types) > 1:  # numbers beside lists
            raise invalid(f"{name}: expected nested lists of one shape, got ragged ones", param=name)
        lists = list(chain.from_iterable(lists))
    raise invalid(f"{name}: nested deeper than {MAX_DEPTH} lists", param=name)
