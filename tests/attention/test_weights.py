"""Weights are the softmax, and the largest of them are the largest."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.attention import reference, weights
from service.attention.masks import MaskSpec
from service.attention.weights import attention_weights, top_weights

from .helpers import Case, cases


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(max_length=30), data=st.data())
def test_weights_times_values_is_attention(case: Case, data):
    q, k, v = (x.float() for x in case.tensors)
    chosen = data.draw(st.none() | st.lists(st.integers(0, q.shape[2] - 1), min_size=1, max_size=5).map(tuple))
    told = attention_weights(q, k, case.mask, chosen, **case.options)
    assert told.dtype == torch.float32
    expected = reference.attend(q.double(), k.double(), v.double(), case.mask, **case.options).out
    expected = expected if chosen is None else expected[:, :, list(chosen)]
    value = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    torch.testing.assert_close(told.double() @ value, expected, atol=1e-5, rtol=1e-4)

    top_k = data.draw(st.integers(1, 40))
    values, indices = top_weights(q, k, case.mask, chosen, top_k, **case.options)
    assert values.shape == indices.shape == (*told.shape[:3], top_k)
    assert indices.dtype == torch.int64
    kept = min(top_k, k.shape[2])
    torch.testing.assert_close(values[..., :kept], told.topk(kept, -1).values)
    picked = told.gather(-1, indices.clamp(min=0)) * (indices >= 0)
    torch.testing.assert_close(picked, values)
    assert ((indices == -1) == (values == 0)).all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    q, k = torch.randn(2, 4, 33, 8), torch.randn(2, 2, 50, 8)
    mask = MaskSpec(is_causal=True, attn_mask=torch.randn(4, 33, 50))
    whole = attention_weights(q, k, mask)
    monkeypatch.setattr(weights, "SCRATCH_BYTES", 4 * 4 * 50 * 2)
    calls = []
    torch.testing.assert_close(attention_weights(q, k, mask, checkpoint=lambda: calls.append(1)), whole)
    assert len(calls) == 2 * 17
