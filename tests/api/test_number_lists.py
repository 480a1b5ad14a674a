"""Lists of a caller become arrays only once they are known to be small and regular."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from service.api import codec
from service.api.number_lists import BOOLS, INTEGERS, MAX_DEPTH, NUMBERS, array_of
from service.api.open_inference import tensors
from service.errors import FarsightError, Kind

ACCEPTED: dict[frozenset[type], type] = {NUMBERS: np.float64, BOOLS: np.bool_}


def read(value: Any) -> Any:
    return array_of("query", value, ACCEPTED, "expected numbers")


def deep(levels: int) -> Any:
    value: Any = 1.0
    for _ in range(levels):
        value = [value]
    return value


def test_regular_lists_become_arrays() -> None:
    assert read([[1, 2.5], [3, 4]]).tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert read([True, False]).dtype == np.bool_
    assert read([[], []]).shape == (2, 0)
    assert read([]).dtype == np.float64
    assert read([2**64, -(2**63)]).tolist() == [2.0**64, -(2.0**63)]
    assert read(deep(MAX_DEPTH)).shape == (1,) * MAX_DEPTH
    assert array_of("ids", [1, 2], {INTEGERS: np.int64}, "expected integers").dtype == np.int64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, "a"], "query: expected numbers"),
        ([True, 1], "query: expected numbers"),
        ([None], "query: expected numbers"),
        ([{}], "query: expected numbers"),
        ("text", "query: expected numbers"),
        (1.0, "query: expected numbers"),
        ([[1], [1, 2]], "ragged"),
        ([[1], 2], "ragged"),
        ([[[1]], [2]], "ragged"),
        (deep(MAX_DEPTH + 1), "nested deeper than 8 lists"),
        (deep(900), "nested deeper than 8 lists"),
    ],
)
def test_others_are_refused(value: Any, message: str) -> None:
    with pytest.raises(FarsightError, match=message) as caught:
        read(value)
    assert (caught.value.kind, caught.value.param) == (Kind.INVALID, "query")


HOSTILE: dict[str, Any] = {
    "one long string": ["x" * 100_000, *[""] * 20_000],
    "long strings in lists": [["x" * 50_000, *[""] * 5_000]] * 4,
    "one long list": [[0.0] * 50_000, *[[]] * 50_000],
    "a large integer": [10**4000, *[0] * 20_000],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "parse",
    [
        lambda value: codec.tensor_from_json("query", value),
        lambda value: tensors.from_list("query", "FP32", [20_001], value),
        lambda value: tensors.from_list("query", "INT64", [20_001], value),
        lambda value: tensors.from_list("query", "BOOL", [20_001], value),
    ],
    ids=["attention", "FP32", "INT64", "BOOL"],
)
def test_what_is_refused_takes_no_more_memory_than_it_has(name: str, parse: Callable[[Any], Any]) -> None:
    value = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(FarsightError) as caught:
            parse(value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.kind is Kind.INVALID
    assert len(caught.value.message) < 300
    assert peak < 4 << 20  # NumPy would take 0.4 to 8 GB for the strings
