"""Merging over any split of the keys is the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.attention import reference
from service.attention.masks import MaskSpec
from service.attention.merge import merge


@settings(max_examples=40, deadline=None, derandomize=True)
@given(at=st.integers(1, 39), seed=st.integers(0, 1000))
def test_any_split_is_the_whole(at, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 2, 17, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    hidden = torch.rand(1, 2, 17, 40) > 0.9
    whole = reference.attend(q, k, v, MaskSpec(attn_mask=hidden))
    parts = [
        reference.attend(q, k[:, :, part], v[:, :, part], MaskSpec(attn_mask=hidden[..., part]))
        for part in (slice(0, at), slice(at, 40))
    ]
    out, lse = merge(parts[0].out, parts[0].lse, parts[1].out, parts[1].lse)
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)


def test_empty_sides():
    out, nothing = torch.randn(1, 3, 4), torch.full((1, 3), -torch.inf)
    lse = torch.randn(1, 3)
    merged, merged_lse = merge(out, lse, torch.zeros_like(out), nothing)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    both, both_lse = merge(torch.zeros_like(out), nothing, torch.zeros_like(out), nothing)
    assert not both.any()
    assert (both_lse == -torch.inf).all()


def test_half_precision_merges_in_float32():
    out = torch.randn(1, 3, 4).bfloat16()
    merged, _ = merge(out, torch.zeros(1, 3), out, torch.zeros(1, 3))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, out.float())


@pytest.mark.parametrize("lse", [1e4, -1e9, -1e38])
def test_large_numbers_are_averaged_not_added(lse):
    """log 2 is lost beside 1e9: shares that did not add up to one would double the answer."""
    out = torch.tensor([[1.0, 2.0]])
    side = torch.tensor([lse])
    merged, both = merge(out, side, 3 * out, side)
    torch.testing.assert_close(merged, 2 * out)
    torch.testing.assert_close(both, side, rtol=1e-4, atol=0)
