"""safetensors read and written without copies, compared with the library's own reader and writer."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from service.api.safetensors_io import MAX_HEADER_BYTES, dump_safetensors, tensors_from_safetensors
from service.errors import FarsightError, Kind

TENSORS = {
    "query": torch.randn(1, 2, 3, 4),
    "key": torch.randn(2, 3).to(torch.bfloat16),
    "value": torch.randn(5).half(),
    "attn_mask": torch.tensor([True, False]),
}


def refusal(body: bytes) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        tensors_from_safetensors(body)
    return caught.value


def written(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_the_library_writes_is_read() -> None:
    body = save(TENSORS, metadata={"options": json.dumps({"is_causal": True})})
    tensors, options = tensors_from_safetensors(body)
    assert options == {"is_causal": True}
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], sent) and tensors[name].dtype == sent.dtype for name, sent in TENSORS.items())


def test_tensors_share_the_memory_of_the_body() -> None:
    body = bytearray(save({"query": torch.ones(4096)}))
    tensors, _ = tensors_from_safetensors(memoryview(body))
    body[-4:] = b"\0\0\0\0"
    assert tensors["query"][-1] == 0


def test_the_library_reads_what_is_written(tmp_path: Any) -> None:
    tensors = {"output": torch.randn(2, 3).T, "lse": torch.randn(3).half(), "top_indices": torch.tensor([[1, 2]])}
    parts = dump_safetensors(tensors, {"plan": {"kind": "dense"}})
    body = b"".join(parts)
    read = load(body)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], written) for name, written in tensors.items())
    path = tmp_path / "answer.safetensors"
    path.write_bytes(body)
    with safe_open(path, "pt") as opened:
        assert orjson.loads(opened.metadata()["answer"]) == {"plan": {"kind": "dense"}}


def test_written_tensors_are_not_copied() -> None:
    output = torch.zeros(1000)
    parts = dump_safetensors({"output": output}, {})
    output[0] = 1.0
    assert bytes(parts[1][:4]) == torch.ones(1).numpy().tobytes()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "a header of 0 bytes"),
        (b"\xff" * 16, "a header of"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 2), "a header of"),
        (written([]), "expected a JSON object, got list"),
        (written({"__metadata__": {"options": 3}}), "must map names to text"),
        (written({"query": 3}), "'query' needs exactly dtype, shape and data_offsets"),
        (written({"query": {**ENTRY, "more": 1}}, b"\0" * 8), "'query' needs exactly dtype, shape and data_offsets"),
        (written({"query": {**ENTRY, "dtype": []}}, b"\0" * 8), "'query' needs exactly dtype, shape and data_offsets"),
        (
            written({"query": {**ENTRY, "shape": [-2]}}, b"\0" * 8),
            "'query' needs exactly dtype, shape and data_offsets",
        ),
        (written({"query": ENTRY}, b"\0" * 9), "its tensors take 8 bytes, it has 9"),
        (written({"query": ENTRY}, b"\0" * 7), "its tensors take 8 bytes, it has 7"),
        (written({"query": ENTRY, "key": ENTRY}, b"\0" * 8), "does not begin at byte 8"),
        (written({"query": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12), "does not begin at byte 0"),
        (written({"query": {**ENTRY, "shape": [3]}}, b"\0" * 8), "takes 12 bytes, got 8"),
    ],
)
def test_broken_files_are_refused_by_what_is_broken(body: bytes, says: str) -> None:
    error = refusal(body)
    assert error.kind in (Kind.MALFORMED, Kind.INVALID)
    assert says in error.message


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), value=st.integers(0, 255))
def test_broken_safetensors_are_refused_whatever_is_broken(cut: int, flip: int, value: int) -> None:
    body = bytearray(save({"query": torch.ones(2, 2), "key": torch.ones(2, 2)}, metadata={"options": "{}"}))
    body[flip % len(body)] = value
    refused: FarsightError | None = None
    tensors: dict[str, torch.Tensor] = {}
    try:
        tensors, _ = tensors_from_safetensors(bytes(body[: len(body) - cut]))
    except FarsightError as error:
        refused = error
    if refused is not None:
        assert refused.kind in (Kind.MALFORMED, Kind.INVALID)
    else:
        assert cut == 0
        assert all(tensor.numel() <= 8 for tensor in tensors.values())


def test_a_strange_dtype_is_refused() -> None:
    error = refusal(save({"query": torch.ones(2, dtype=torch.int32)}))
    assert (error.kind, error.param) == (Kind.INVALID, "query")
