"""The edge: tensors and options of one attention request are checked here, once, and trusted from then on."""

from __future__ import annotations

from math import isfinite

import torch

from service.core.options import AttentionOptions
from service.errors import FarsightError, invalid

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_POSITION = 2**31 - 1  # of windows and offsets: sums with positions stay far inside int64


def check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    options: AttentionOptions,
    *,
    known_finite: bool = False,
) -> Tensors:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> the same, rank 4 and finite.

    Rank 3 for all three means B = 1. Raises FarsightError (422) that names the tensor or option. NaN and infinity are
    refused but for keys and values that kv_lengths masks out, which are zeroed in a copy: 0 * NaN would leak.
    `known_finite`: the decoder of all three has seen to that.
    """
    query, key, value = _rank_four(query, key, value)
    _check_shapes(query, key, value)
    _check_dtypes(query, key, value)
    _check_options(options, query.shape[0], query.shape[2], key.shape[2])
    if attn_mask is not None:
        _check_mask(attn_mask, (query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    if known_finite:
        return query, key, value
    _check_finite("query", query)
    if options.kv_lengths is not None:
        key, value = (_blank(x, options.kv_lengths) for x in (key, value))
    _check_finite("key", key)
    _check_finite("value", value)
    return query, key, value


def _rank_four(*tensors: torch.Tensor) -> Tensors:
    rank = tensors[0].dim()
    query, key, value = tensors
    if rank == key.dim() == value.dim() == 4:
        return query, key, value
    expected = "[B, H, L, D]" if rank == 4 else "[H, L, D]" if rank == 3 else "[B, H, L, D] or [H, L, D]"
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if rank not in (3, 4) or tensor.dim() != rank:
            raise _wrong_shape(name, expected, tensor)
    return query[None], key[None], value[None]


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    batch, heads, _, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    fits = (key.shape[0], key.shape[3], *value.shape[:3]) == (batch, head_dim, batch, kv_heads, key_length)
    if fits and query.numel() and key.numel() and value.numel() and not heads % kv_heads:
        return
    table = (
        ("query", query, ("B", "Hq", "Lq", "D")),
        ("key", key, (batch, "Hkv", "Lk", head_dim)),
        ("value", value, (batch, kv_heads, key_length, "Dv")),
    )
    for name, tensor, expected in table:
        pairs = zip(tensor.shape, expected, strict=True)
        if any(size != wanted if isinstance(wanted, int) else size == 0 for size, wanted in pairs):
            free = " with no size 0" if 0 in tensor.shape else ""
            raise _wrong_shape(name, f"({', '.join(map(str, expected))}){free}", tensor)
    if heads % kv_heads:
        raise invalid(f"query: expected heads a multiple of the {kv_heads} key heads, got {heads}", param="query")


def _check_dtypes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dtype not in DTYPES:
        raise invalid(f"query: expected float32, bfloat16 or float16, got {_name(query.dtype)}", param="query")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise invalid(f"{name}: expected {_name(query.dtype)} like query, got {_name(tensor.dtype)}", param=name)


def _check_options(options: AttentionOptions, batch: int, query_length: int, key_length: int) -> None:
    lengths = options.kv_lengths
    if lengths is not None and len(lengths) != batch:
        raise invalid(f"kv_lengths: expected ({batch},), got ({len(lengths)},)", param="kv_lengths")
    for length in lengths or ():
        if not 0 <= length <= key_length:
            raise invalid(f"kv_lengths: expected 0 to {key_length}, got {length}", param="kv_lengths")
    if options.rows is not None:
        if not options.rows:
            raise invalid("rows: expected at least one row, got none", param="rows")
        if len(options.rows) > query_length:
            raise invalid(f"rows: expected at most {query_length} of them, got {len(options.rows)}", param="rows")
        wrong = next((row for row in options.rows if not 0 <= row < query_length), None)
        if wrong is not None:
            raise invalid(f"rows: expected 0 to {query_length - 1}, got {wrong}", param="rows")
    positions = {"causal_alignment": [options.causal_alignment], "window": options.window or ()}
    for name, numbers in positions.items():
        for number in numbers:
            if isinstance(number, int) and abs(number) > MAX_POSITION:
                raise invalid(f"{name}: expected at most {MAX_POSITION} in size, got {number}", param=name)
    if options.stage != "softmax" and not {"weights", "top_weights"} & set(options.returns):
        raise invalid(
            f"stage: {options.stage} is a stage of weights or top_weights, returns asks for neither", param="stage"
        )
    if options.mode == "sparse" and options.max_error == 0:
        raise invalid("max_error: 0 asks for an exact answer and mode sparse for an approximate one", param="max_error")


def _check_mask(mask: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise invalid(f"attn_mask: expected bool or float, got {_name(mask.dtype)}", param="attn_mask")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > 4 or any(size not in (1, wanted) for size, wanted in sizes):
        raise _wrong_shape("attn_mask", f"broadcastable to {shape}", mask)
    if mask.dtype == torch.bool:
        return
    low, high = (float(x) for x in torch.aminmax(mask))
    if high != high or low != low or high == torch.inf:
        wrong = int((mask.isnan() | (mask == torch.inf)).sum())
        raise invalid(f"attn_mask: expected finite numbers or -inf, got {wrong} NaN or +inf", param="attn_mask")


def _all_finite(tensor: torch.Tensor) -> bool:
    # one pass without a copy: aminmax hands NaN on
    low, high = torch.aminmax(tensor)
    return isfinite(low) and isfinite(high)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not _all_finite(tensor):
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        raise invalid(f"{name}: expected finite numbers, got {wrong} NaN or infinite", param=name)


def _blank(tensor: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Zeros where kv_lengths masks out, in a copy and only where something there is not finite."""
    if _all_finite(tensor):
        return tensor
    tensor = tensor.clone()
    for b, length in enumerate(lengths):
        tensor[b, :, length:] = 0
    return tensor


def _wrong_shape(name: str, expected: str, tensor: torch.Tensor) -> FarsightError:
    return invalid(f"{name}: expected {expected}, got {tuple(tensor.shape)}", param=name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
