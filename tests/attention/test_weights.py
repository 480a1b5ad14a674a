"""Weights are the softmax, scores are what their stage says, and the largest of them are the largest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.attention import reference, weights
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.weights import WeightsView, attention_weights, top_weights
from service.errors import FarsightError

from .helpers import Case, cases

SCORES = ("raw", "capped", "masked")
STAGES = (*SCORES, "softmax")


def exact_stage(case: Case, stage: str) -> torch.Tensor:
    """[B, Hq, Lq, Lk] float64 by the definition of each stage."""
    q, k = case.query.double(), case.key.double().repeat_interleave(case.query.shape[1] // case.key.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if stage != "raw" and case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.mask.kv_lengths is not None:
        past = torch.arange(k.shape[2]) >= case.mask.kv_lengths[:, None, None, None]
        scores = scores.masked_fill(past, -torch.inf)
    if stage in ("raw", "capped"):
        return scores
    seen = reference.visible(case.mask, q.shape[0], q.shape[2], k.shape[2])
    bias = case.mask.attn_mask
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores if stage == "masked" else torch.softmax(scores, -1).nan_to_num(0.0)


def assert_top(values: torch.Tensor, indices: torch.Tensor, exact: torch.Tensor, hidden: float) -> None:
    """The largest of `exact` in order, at the keys that are named, and nothing where it shows no more."""
    kept = min(values.shape[-1], exact.shape[-1])
    torch.testing.assert_close(values[..., :kept].double(), exact.topk(kept, -1).values, atol=1e-5, rtol=1e-5)
    assert (values[..., kept:] == hidden).all()
    assert ((indices == -1) == (values == hidden)).all()
    named = exact.gather(-1, indices.clamp(min=0)).masked_fill(indices == -1, hidden)
    torch.testing.assert_close(values.double(), named, atol=1e-5, rtol=1e-5)
    rows = indices.flatten(0, -2).tolist()
    assert all(len(set(row) - {-1}) == sum(index >= 0 for index in row) for row in rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(max_length=30), data=st.data())
def test_weights_times_values_is_attention(case: Case, data):
    q, k, v = (x.float() for x in case.tensors)
    chosen = data.draw(st.none() | st.lists(st.integers(0, q.shape[2] - 1), min_size=1, max_size=5).map(tuple))
    told = attention_weights(q, k, case.mask, WeightsView(chosen), scoring=case.scoring)
    assert told.dtype == torch.float32
    expected = reference.attend(q.double(), k.double(), v.double(), case.mask, scoring=case.scoring).out
    expected = expected if chosen is None else expected[:, :, list(chosen)]
    value = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    torch.testing.assert_close(told.double() @ value, expected, atol=1e-5, rtol=1e-4)

    top_k = data.draw(st.integers(1, 40))
    values, indices = top_weights(q, k, case.mask, WeightsView(chosen), top_k, scoring=case.scoring)
    assert values.shape == indices.shape == (*told.shape[:3], top_k)
    assert indices.dtype == torch.int64
    kept = min(top_k, k.shape[2])
    torch.testing.assert_close(values[..., :kept], told.topk(kept, -1).values)
    picked = told.gather(-1, indices.clamp(min=0)) * (indices >= 0)
    torch.testing.assert_close(picked, values)
    assert ((indices == -1) == (values == 0)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(max_length=30), data=st.data())
def test_every_stage_is_what_it_says(case: Case, data):
    stage = data.draw(st.sampled_from(SCORES))
    rows = st.lists(st.integers(0, case.query.shape[2] - 1), min_size=1, max_size=5).map(tuple)
    chosen = data.draw(st.none() | rows)
    exact = exact_stage(case, stage)
    exact = exact if chosen is None else exact[:, :, list(chosen)]

    told = attention_weights(case.query, case.key, case.mask, WeightsView(chosen, stage), scoring=case.scoring)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told.double(), exact, atol=1e-5, rtol=1e-5)

    top_k = data.draw(st.integers(1, 40))
    values, indices = top_weights(
        case.query, case.key, case.mask, WeightsView(chosen, stage), top_k, scoring=case.scoring
    )
    assert values.shape == indices.shape == (*exact.shape[:3], top_k)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert_top(values, indices, exact, -torch.inf)


def together() -> Case:
    """Causal, capped, biased, padded and grouped at once; what lies past `kv_lengths` is garbage."""
    torch.manual_seed(0)
    query, key, value = 4 * torch.randn(3, 6, 9, 8), torch.randn(3, 2, 14, 8), torch.randn(3, 2, 14, 8)
    bias = torch.randn(3, 1, 9, 14).masked_fill(torch.rand(3, 1, 9, 14) < 0.2, -torch.inf)
    lengths = torch.tensor([11, 14, 0])
    mask = MaskSpec(is_causal=True, window=(5, -1), kv_lengths=lengths, attn_mask=bias)
    return Case(query, key, value, mask, 0.7, 3.0)


@pytest.mark.parametrize("stage", STAGES)
def test_everything_together(stage):
    case = together()
    exact = exact_stage(case, stage)
    hidden = 0.0 if stage == "softmax" else -torch.inf
    shown = int((exact[0] != hidden).sum())
    assert shown == 6 * 9 * 11 if stage in ("raw", "capped") else 0 < shown < 6 * 9 * 6
    told = attention_weights(case.query, case.key, case.mask, WeightsView(stage=stage), scoring=case.scoring)
    torch.testing.assert_close(told.double(), exact, atol=1e-5, rtol=1e-5)
    assert (told[2] == hidden).all()
    values, indices = top_weights(case.query, case.key, case.mask, WeightsView(stage=stage), 12, scoring=case.scoring)
    assert_top(values, indices, exact, hidden)
    assert (indices[0] < 11).all()
    assert (indices[2] == -1).all()


@pytest.mark.parametrize("stage", SCORES)
def test_keys_past_their_length_are_never_read(stage):
    case = together()
    expected = attention_weights(case.query, case.key, case.mask, WeightsView(stage=stage), scoring=case.scoring)
    case.key[0, :, 11:], case.key[2] = torch.nan, torch.inf
    told = attention_weights(case.query, case.key, case.mask, WeightsView(stage=stage), scoring=case.scoring)
    assert torch.equal(told, expected)


def test_the_stages_follow_from_each_other():
    case = together()
    raw, capped, masked, softmax = (
        attention_weights(case.query, case.key, case.mask, WeightsView(stage=stage), scoring=case.scoring)
        for stage in STAGES
    )
    torch.testing.assert_close(3.0 * torch.tanh(raw / 3.0).masked_fill(raw == -torch.inf, -torch.inf), capped)
    assert not torch.allclose(raw[1], capped[1])
    seen = masked != -torch.inf
    bias = case.mask.attn_mask.expand_as(masked)
    torch.testing.assert_close(masked[seen], (capped + bias)[seen])
    torch.testing.assert_close(torch.softmax(masked, -1).nan_to_num(0.0), softmax)
    plain = attention_weights(case.query, case.key, MaskSpec(), WeightsView(stage="masked"), scoring=Scoring(0.7))
    assert torch.equal(
        plain, attention_weights(case.query, case.key, MaskSpec(), WeightsView(stage="raw"), scoring=Scoring(0.7))
    )


def test_ranks_differ_by_stage():
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    mask = MaskSpec(attn_mask=torch.tensor([5.0, 0.0, -torch.inf]))
    found = {
        stage: top_weights(query, key, mask, WeightsView(stage=stage), top_k=4)[1].flatten().tolist()
        for stage in STAGES
    }
    ranked, hidden = [2, 1, 0, -1], [0, 1, -1, -1]
    assert found == {"raw": ranked, "capped": ranked, "masked": hidden, "softmax": hidden}


def test_a_score_that_overflows_is_refused_where_it_is_shown():
    query = torch.full((1, 1, 1, 1), 1e30)
    for largest in (1e30, -1e30):
        key = torch.tensor([1.0, largest])[None, None, :, None]
        with pytest.raises(FarsightError, match="raw scores overflow") as caught:
            attention_weights(query, key, MaskSpec(), WeightsView(stage="raw"))
        assert caught.value.code == "non_finite"
        assert (
            attention_weights(query, key, MaskSpec(), WeightsView(stage="capped"), scoring=Scoring(softcap=2.0))[
                0, 0, 0, 1
            ].abs()
            == 2
        )
        first = MaskSpec(is_causal=True, causal_alignment="top_left")
        told = attention_weights(query, key, first, WeightsView(stage="masked"))
        assert told[0, 0, 0].tolist() == [pytest.approx(1e30), -torch.inf]
    with pytest.raises(FarsightError, match="masked scores overflow"):
        top_weights(query, key.abs(), MaskSpec(), WeightsView(stage="masked"))


def test_the_lowest_number_as_a_bias_hides_nothing_from_the_scores():
    lowest = torch.finfo(torch.float32).min
    told = attention_weights(
        *torch.randn(2, 1, 1, 3, 4), MaskSpec(attn_mask=torch.tensor(lowest)), WeightsView(stage="masked")
    )
    assert (told == lowest).all()


@pytest.mark.parametrize("stage", STAGES)
def test_blocks_of_rows_change_nothing(monkeypatch, stage):
    q, k = torch.randn(2, 4, 33, 8), torch.randn(2, 2, 50, 8)
    mask = MaskSpec(is_causal=True, attn_mask=torch.randn(4, 33, 50))
    whole = attention_weights(q, k, mask, WeightsView(stage=stage))
    monkeypatch.setattr(weights, "ROWS_BYTES", 4 * 4 * 50 * 2)
    calls = []
    parts = attention_weights(q, k, mask, WeightsView(stage=stage), checkpoint=lambda: calls.append(1))
    torch.testing.assert_close(parts, whole)
    assert len(calls) == 2 * 17
