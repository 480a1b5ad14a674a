"""The edge refuses what cannot be right, names it, and lets everything else through unchanged."""

import pytest
import torch
from pydantic import ValidationError

from service.attention.dispatch import attend
from service.attention.masks import mask_of
from service.attention.validate import check_attention
from service.core.options import AttentionOptions
from service.core.plan import PlanKind
from service.errors import FarsightError, Kind


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def holed(*shape, number=torch.nan):
    tensor = torch.zeros(*shape)
    tensor.view(-1)[:2] = number
    return tensor


GOOD = {"query": rand(2, 4, 5, 8), "key": rand(2, 2, 6, 8), "value": rand(2, 2, 6, 3), "attn_mask": None}
BAD = [
    ("query", {"query": rand(5, 8)}, "query: expected [B, H, L, D] or [H, L, D], got (5, 8)"),
    ("key", {"key": rand(2, 6, 8)}, "key: expected [B, H, L, D], got (2, 6, 8)"),
    ("key", {"key": rand(1, 2, 6, 8)}, "key: expected (2, Hkv, Lk, 8), got (1, 2, 6, 8)"),
    ("key", {"key": rand(2, 2, 6, 9)}, "key: expected (2, Hkv, Lk, 8), got (2, 2, 6, 9)"),
    ("value", {"value": rand(2, 2, 7, 3)}, "value: expected (2, 2, 6, Dv), got (2, 2, 7, 3)"),
    ("value", {"value": rand(2, 1, 6, 3)}, "value: expected (2, 2, 6, Dv), got (2, 1, 6, 3)"),
    ("value", {"value": rand(2, 2, 6, 0)}, "value: expected (2, 2, 6, Dv) with no size 0, got (2, 2, 6, 0)"),
    ("query", {"query": rand(2, 4, 0, 8)}, "query: expected (B, Hq, Lq, D) with no size 0, got (2, 4, 0, 8)"),
    ("query", {"query": rand(2, 3, 5, 8)}, "query: expected heads a multiple of the 2 key heads, got 3"),
    ("query", {"query": rand(2, 4, 5, 8).long()}, "query: expected float32, bfloat16 or float16, got int64"),
    ("value", {"value": rand(2, 2, 6, 3, dtype=torch.float16)}, "value: expected float32 like query, got float16"),
    ("query", {"query": holed(2, 4, 5, 8)}, "query: expected finite numbers, got 2 NaN or infinite"),
    ("key", {"key": holed(2, 2, 6, 8, number=-torch.inf)}, "key: expected finite numbers, got 2 NaN or infinite"),
    ("value", {"value": holed(2, 2, 6, 3)}, "value: expected finite numbers, got 2 NaN or infinite"),
    ("attn_mask", {"attn_mask": rand(5, 7)}, "attn_mask: expected broadcastable to (2, 4, 5, 6), got (5, 7)"),
    ("attn_mask", {"attn_mask": rand(1, 2, 4, 5, 6)}, "attn_mask: expected broadcastable to"),
    ("attn_mask", {"attn_mask": torch.ones(5, 6).int()}, "attn_mask: expected bool or float, got int32"),
    ("attn_mask", {"attn_mask": holed(5, 6)}, "attn_mask: expected finite numbers or -inf, got 2 NaN or +inf"),
    ("attn_mask", {"attn_mask": holed(5, 6, number=torch.inf)}, "attn_mask: expected finite numbers or -inf, got 2"),
    ("kv_lengths", {"kv_lengths": (6,)}, "kv_lengths: expected (2,), got (1,)"),
    ("kv_lengths", {"kv_lengths": (6, 7)}, "kv_lengths: expected 0 to 6, got 7"),
    ("rows", {"rows": (0, 5)}, "rows: expected 0 to 4, got 5"),
    ("rows", {"rows": (-1,)}, "rows: expected 0 to 4, got -1"),
    ("rows", {"rows": ()}, "rows: expected at least one row, got none"),
    ("window", {"window": (2**40, 0)}, "window: expected at most 2147483647 in size, got"),
    ("causal_alignment", {"causal_alignment": -(10**30)}, "causal_alignment: expected at most 2147483647 in size"),
    ("max_error", {"mode": "sparse", "max_error": 0}, "max_error: 0 asks for an exact answer"),
    ("stage", {"stage": "raw"}, "stage: raw is a stage of weights or top_weights, returns asks for neither"),
    ("stage", {"stage": "masked", "returns": ("output", "lse")}, "stage: masked is a stage of weights or top_weights"),
]


def check(changes):
    tensors = GOOD | {name: x for name, x in changes.items() if name in GOOD}
    options = AttentionOptions(**{name: x for name, x in changes.items() if name not in GOOD})
    return check_attention(**tensors, options=options)


@pytest.mark.parametrize(("param", "changes", "message"), BAD, ids=[f"{p}-{i}" for i, (p, *_) in enumerate(BAD)])
def test_refused_with_the_name_and_the_sizes(param, changes, message):
    with pytest.raises(FarsightError) as caught:
        check(changes)
    assert caught.value.kind is Kind.INVALID
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_mask": torch.zeros(())},
        {"attn_mask": torch.full((2, 1, 5, 6), -torch.inf)},
        {"attn_mask": torch.ones(4, 1, 6, dtype=torch.bool), "is_causal": True},
        {"kv_lengths": (0, 6), "window": (-1, 3), "causal_alignment": -4},
        {"mode": "sparse", "max_error": 0.1},
    ],
)
def test_let_through_unchanged(changes):
    q, k, v = check(changes)
    assert (q is GOOD["query"], k is GOOD["key"], v is GOOD["value"]) == (True, True, True)


def test_rank_three_means_one_sequence():
    q, k, v = check({"query": rand(4, 5, 8), "key": rand(2, 6, 8), "value": rand(2, 6, 3)})
    assert (q.shape, k.shape, v.shape) == ((1, 4, 5, 8), (1, 2, 6, 8), (1, 2, 6, 3))


def test_garbage_past_kv_lengths_is_zeroed_in_a_copy():
    key, value = GOOD["key"].clone(), GOOD["value"].clone()
    key[1, :, 4:], value[0, :, 5] = torch.nan, torch.inf
    options = AttentionOptions(kv_lengths=(5, 4), is_causal=True)
    q, k, v = check_attention(GOOD["query"], key, value, None, options)
    assert key.isnan().any()
    assert not k[1, :, 4:].any()
    assert torch.equal(k[0, :, :5], key[0, :, :5])
    clean = check_attention(GOOD["query"], GOOD["key"], GOOD["value"], None, options)
    for kind in PlanKind:
        told, expected = (attend(*x, kind, mask_of(options)).out for x in ((q, k, v), clean))
        assert torch.equal(told, expected)
    key[1, :, 3] = torch.nan
    with pytest.raises(FarsightError, match="key: expected finite numbers, got 16"):
        check_attention(GOOD["query"], key, value, None, options)


def test_options_refuse_their_own_nonsense():
    with pytest.raises(ValidationError):
        AttentionOptions(window=(-2, 0))
