"""Raw bytes and lists to tensors: exact, bounded by what was sent, and without warnings or copies."""

from __future__ import annotations

import struct
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.codec import raw_bytes
from service.api.open_inference import tensors
from service.errors import FarsightError, Kind

SAMPLES = {
    "BOOL": torch.tensor([[True, False], [False, True]]),
    "INT32": torch.tensor([[1, -2], [3, 2**31 - 1]], dtype=torch.int32),
    "INT64": torch.tensor([[1, -2], [3, 2**62]]),
    "FP16": torch.tensor([[1.5, -2], [0, 6e4]], dtype=torch.float16),
    "BF16": torch.tensor([[1.5, -2], [0, 3e38]], dtype=torch.bfloat16),
    "FP32": torch.tensor([[1.5, -2], [0, float("-inf")]]),
    "FP64": torch.tensor([[1.5, -2], [0, 1e300]], dtype=torch.float64),
}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(raw_bytes(tensor))


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("datatype", SAMPLES)
def test_raw_round_trip(datatype: str) -> None:
    sample = SAMPLES[datatype]
    back = tensors.from_raw("x", datatype, [2, 2], raw(sample))
    assert isinstance(back, torch.Tensor)
    assert back.dtype == sample.dtype
    assert torch.equal(back, sample)
    assert tensors.datatype_of(sample) == datatype


@pytest.mark.parametrize("datatype", sorted(set(SAMPLES) - tensors.RAW_ONLY))
def test_list_round_trip(datatype: str) -> None:
    sample = SAMPLES[datatype]
    for data in (sample.tolist(), tensors.to_numbers(sample).tolist()):  # nested and flat
        back = tensors.from_list("x", datatype, [2, 2], data)
        assert isinstance(back, torch.Tensor)
        assert back.dtype == sample.dtype
        assert torch.equal(back, sample)


def test_raw_is_little_endian_and_row_major() -> None:
    back = tensors.from_raw("x", "FP32", [2, 1], struct.pack("<2f", 1, 2))
    assert torch.equal(torch.as_tensor(back), torch.tensor([[1.0], [2.0]]))
    assert raw(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).T) == struct.pack("<4i", 1, 3, 2, 4)


@pytest.mark.parametrize("make", [bytes, bytearray])
def test_large_buffers_are_shared_without_a_warning(make: Any) -> None:
    data = make(8192 * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = tensors.from_raw("x", "FP32", [4096], memoryview(data)[: 4096 * 4])
        second = tensors.from_raw("x", "FP32", [4096], memoryview(data)[4096 * 4 :])
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert second.data_ptr() - first.data_ptr() == 4096 * 4


def test_a_shared_buffer_outlives_its_name() -> None:
    data = torch.arange(100_000, dtype=torch.int32)
    back = tensors.from_raw("x", "INT32", [100_000], raw(data))
    junk = [bytes(400_000) for _ in range(8)]  # would land in freed memory
    assert isinstance(back, torch.Tensor)
    assert torch.equal(back, data)
    assert junk


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("make", [bytes, bytearray])
def test_unaligned_data_is_copied_to_a_boundary(make: Any, shift: int) -> None:
    sample = torch.randn(4096)
    body = make(b"x" * shift + raw(sample))
    back = tensors.from_raw("x", "FP32", [4096], memoryview(body)[shift:])
    assert isinstance(back, torch.Tensor)
    assert back.data_ptr() % 4 == 0
    assert torch.equal(back, sample)


def test_tiny_bytes_are_copied() -> None:
    data = b"\x01"
    back = tensors.from_raw("x", "BOOL", [1], data)
    assert isinstance(back, torch.Tensor)
    back[0] = False
    assert data == bytes([1])


@pytest.mark.parametrize("shape", [[0], [0, 3], [2, 0, 2**40]])
def test_empty(shape: list[int]) -> None:
    assert list(torch.as_tensor(tensors.from_raw("x", "BF16", shape, b"")).shape) == shape
    assert raw(torch.empty(0, dtype=torch.bfloat16)) == b""


def test_a_scalar_has_one_element() -> None:
    assert torch.as_tensor(tensors.from_raw("x", "FP32", [], struct.pack("<f", 2.5))).item() == 2.5
    assert len(raw_bytes(torch.tensor(1.0))) == 4


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", [2, 3], bytes(20), "takes 24 bytes, got 20"),
        ("BF16", [2, 3], bytes(24), "takes 12 bytes, got 24"),
        ("FP32", [2**31, 2**31], b"", "takes 18446744073709551616 bytes, got 0"),
        ("FP32", [2**40, 2**40, 2**40], b"", "too many elements"),
        ("FP32", [0, 2**40, 2**40], b"", "too many elements"),
        ("FP32", [-1, 4], bytes(16), "negative"),
        ("FP32", [-2, -2], bytes(16), "negative"),
        ("FP32", [1] * 9, bytes(4), "9 dimensions"),
        ("UINT8", [4], bytes(4), "datatype: expected one of .*, got 'UINT8'"),
        ("BOOL", [2], b"\x01\x02", "0 or 1"),
        ("BYTES", [2**40], b"", "at least 4398046511104 bytes, got 0"),
        ("BYTES", [1], b"\xff\xff\xff\xffa", "4294967295 bytes long, 1 bytes are left"),
        ("BYTES", [2], b"\x04\0\0\0abcd", "before element 1 of 2"),
        ("BYTES", [1], b"\x01\0\0\0ab", "take 5 bytes, got 6"),
    ],
)
def test_raw_refusals_name_the_numbers(datatype: str, shape: list[int], data: bytes, says: str) -> None:
    with pytest.raises(FarsightError, match=says) as caught:
        tensors.from_raw("query", datatype, shape, data)
    assert caught.value.kind == Kind.INVALID
    assert caught.value.param == "query"
    assert caught.value.message.startswith("query: ")


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP16", [1], [1.0], "FP16 has no form"),
        ("BF16", [1], [1.0], "BF16 has no form"),
        ("FP32", [2], [1.0], "takes 2 elements, got 1"),
        ("FP32", [2], [[1.0], [2.0, 3.0]], "one shape"),
        ("FP32", [2], ["1.0", "2.0"], "expected all FP32"),
        ("FP32", [2], [1.0, None], "expected all FP32"),
        ("FP32", [1], [True], "expected all FP32"),
        ("FP32", [1], {"a": 1}, "expected all FP32"),
        ("INT64", [1], [1.5], "expected all INT64"),
        ("INT64", [1], [2**63], "outside the range of INT64"),
        ("INT64", [1], [2**70], "outside the range of INT64"),
        ("INT32", [1], [2**31], "outside the range of INT32"),
        ("BOOL", [1], [1], "expected all BOOL"),
        ("BYTES", [1], [1], "expected all BYTES"),
        ("BYTES", [2], ["a"], "takes 2 elements, got 1"),
        ("BYTES", [1], ["\ud800"], "UTF-8"),
        ("UINT8", [1], [1], "datatype: expected one of .*, got 'UINT8'"),
        ("BYTES", [1], nested("a", 900), "nested deeper"),
        ("FP32", [1], nested(1.0, 900), "nested deeper than 8"),
        ("FP32", [2], [1.0, True], "expected all FP32"),
        ("FP32", [2], [[1.0], 2.0], "one shape"),
    ],
)
def test_list_refusals(datatype: str, shape: list[int], data: Any, says: str) -> None:
    with pytest.raises(FarsightError, match=says) as caught:
        tensors.from_list("query", datatype, shape, data)
    assert caught.value.kind == Kind.INVALID


def test_a_number_over_the_range_of_float32_is_infinity() -> None:
    assert torch.isinf(torch.as_tensor(tensors.from_list("x", "FP32", [1], [1e39]))).all()


def test_half_precision_is_widened_for_json() -> None:
    for datatype in sorted(tensors.RAW_ONLY):
        numbers = tensors.to_numbers(SAMPLES[datatype])
        assert numbers.dtype == "float32"
        assert torch.equal(torch.from_numpy(numbers), SAMPLES[datatype].float().flatten())


def test_strings() -> None:
    assert tensors.from_raw("x", "BYTES", [2], b"\x02\0\0\0ab\0\0\0\0") == [b"ab", b""]
    assert tensors.from_list("x", "BYTES", [2, 1], [["é"], ["b"]]) == ["é".encode(), b"b"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*tensors.DTYPES, "BYTES", "X"]), st.lists(st.integers(-2, 2**64), max_size=9), st.binary())
def test_any_description_of_any_bytes_is_a_tensor_or_a_refusal(datatype: str, shape: list[int], data: bytes) -> None:
    refusal = None
    try:
        back = tensors.from_raw("x", datatype, shape, data)
    except FarsightError as error:
        refusal = error
    assert refusal.kind == Kind.INVALID if refusal else isinstance(back, list) or list(back.shape) == shape
