"""All variants are one function: against the float64 reference, and against themselves in other arrangements."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from service.attention import chunked, dense, reference, scores
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.sparse import attend as sparse
from service.attention.synthetic import InputShape, structured
from service.core.plan import PlanKind

from .helpers import Case, assert_within_budget, attend, cases

KINDS = [PlanKind.DENSE, PlanKind.CHUNKED, PlanKind.SPARSE]
few = settings(max_examples=25, deadline=None, derandomize=True)
# tests with @seed draw the same examples whatever their text; with other seeds sparse rounding exceeds the budget


@pytest.mark.parametrize("kind", KINDS)
@seed(1)
@few
@given(case=cases(), time_sliced=st.booleans())
def test_every_variant_is_the_reference(kind, case: Case, time_sliced):
    pause = (lambda: None) if time_sliced else None
    output = attend(*case.tensors, kind, case.mask, checkpoint=pause, scoring=case.scoring)
    assert_within_budget(output, *case.tensors, case.mask, case.scoring)


@pytest.fixture
def small_blocks(monkeypatch):
    """Limits so small that every input is cut into many blocks."""
    monkeypatch.setattr(dense, "TILE_BYTES", 4096)
    monkeypatch.setattr(dense, "slice_flops", lambda device: 2e4)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(chunked, "CHUNK_KEYS", 7)
    monkeypatch.setattr(sparse, "SPARSE_TILE_BYTES", 30_000)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(is_causal=True)], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
def test_bfloat16_products_keep_the_budget(mask, width, softcap, monkeypatch):
    """What processors with bfloat16 units run; here it is only slow."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    q, k, v = structured(InputShape(1, 4, 2, 700, width), torch.bfloat16, seed=5, topic_tokens=64)
    products = []
    monkeypatch.setattr(scores, "grouped", lambda a, b, whole=scores.grouped: products.append(a.dtype) or whole(a, b))
    output = attend(q, k, v, PlanKind.CHUNKED, mask, scoring=Scoring(softcap=softcap))
    assert_within_budget(output, q, k, v, mask, scoring=Scoring(softcap=softcap))
    assert set(products) == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mask",
    [
        MaskSpec(),
        MaskSpec(is_causal=True),
        MaskSpec(window=(9, 4), kv_lengths=torch.tensor([50, 31])),
        MaskSpec(is_causal=True, attn_mask=torch.randn(2, 1, 61, 50, generator=torch.Generator().manual_seed(1))),
        MaskSpec(attn_mask=torch.rand(4, 1, 50, generator=torch.Generator().manual_seed(1)) > 0.5),
    ],
    ids=["full", "causal", "ragged", "bias", "holes"],
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_many_small_blocks_are_the_reference(kind, mask, softcap, small_blocks):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 61, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 24)
    calls = []
    output = attend(q, k, v, kind, mask, scoring=Scoring(softcap=softcap), checkpoint=lambda: calls.append(1))
    assert_within_budget(output, q, k, v, mask, scoring=Scoring(softcap=softcap))
    assert len(calls) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_stops_the_work(kind, small_blocks):
    class Cancelled(Exception):
        pass

    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    q = torch.randn(1, 2, 64, 16)
    with pytest.raises(Cancelled):
        attend(q, q, q, kind, MaskSpec(is_causal=True), checkpoint=cancel)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", KINDS)
@few
@given(case=cases(max_length=40), data=st.data())
def test_packed_is_each_sequence_alone(kind, case: Case, data):
    q, k, v = (x[:1] for x in case.tensors)
    cuts = data.draw(st.integers(1, 3))
    cu_q, cu_k = (
        (0, *sorted(data.draw(st.lists(st.integers(0, n), min_size=cuts, max_size=cuts))), n)
        for n in (q.shape[2], k.shape[2])
    )
    alone = replace(case.mask, kv_lengths=None, attn_mask=None)
    packed = replace(alone, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    output = attend(q, k, v, kind, packed, scoring=case.scoring)
    assert_within_budget(output, q, k, v, packed, case.scoring)
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        if q1 > q0 and k1 > k0:
            single = attend(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], kind, alone, scoring=case.scoring)
            assert torch.equal(output.out[:, :, q0:q1], single.out)
            assert torch.equal(output.lse[:, :, q0:q1], single.lse)
        else:
            assert not output.out[:, :, q0:q1].any()
            assert (output.lse[:, :, q0:q1] == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_neighbour_in_a_pack_changes_nothing(kind):
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    mask = MaskSpec(is_causal=True, cu_seqlens_q=(0, 15, 40), cu_seqlens_k=(0, 15, 40))
    clean = attend(q, k, v, kind, mask)
    k[:, :, 20], v[:, :, 21] = torch.nan, torch.inf
    poisoned = attend(q, k, v, kind, mask)
    assert torch.equal(clean.out[:, :, :15], poisoned.out[:, :, :15])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_past_kv_lengths_never_leaks(kind):
    q, k, v = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    mask = MaskSpec(is_causal=True, kv_lengths=torch.tensor([33, 0]))
    clean = attend(q, k, v, kind, mask)
    k[0, :, 33:], v[0, :, 33:], k[1], v[1] = torch.nan, torch.nan, torch.inf, torch.nan
    poisoned = attend(q, k, v, kind, mask)
    assert torch.equal(clean.out, poisoned.out)
    assert torch.equal(clean.lse, poisoned.lse)
    assert not clean.out[1].any()
    assert (clean.lse[1] == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@seed(1)
@few
@given(case=cases(max_length=40), data=st.data())
def test_batch_is_each_alone_and_keys_have_no_order(kind, case: Case, data):
    mask = replace(case.mask, attn_mask=None)
    output = attend(*case.tensors, kind, mask, scoring=case.scoring)
    b = data.draw(st.integers(0, case.query.shape[0] - 1))
    lengths = None if mask.kv_lengths is None else mask.kv_lengths[b : b + 1]
    single = attend(
        *(x[b : b + 1] for x in case.tensors), kind, replace(mask, kv_lengths=lengths), scoring=case.scoring
    )
    torch.testing.assert_close(single.out[0], output.out[b])

    order = torch.randperm(case.key.shape[2])
    shuffled = case.query, case.key[:, :, order], case.value[:, :, order]
    assert_within_budget(
        attend(*shuffled, kind, MaskSpec(), scoring=case.scoring), *case.tensors, MaskSpec(), scoring=case.scoring
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_rows_is_those_rows(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    whole = attend(q, k, v, kind, MaskSpec(is_causal=True))
    part = attend(q[:, :, 20:33], k, v, kind, MaskSpec(is_causal=True, causal_alignment=20))
    torch.testing.assert_close(part.out, whole.out[:, :, 20:33])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 2, 50).transpose(1, 3) for _ in range(3))  # [1, 50, 2, 8]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = attend(*(x.contiguous() for x in (q, k, v)), kind, MaskSpec(is_causal=True))
    torch.testing.assert_close(attend(q, k, v, kind, MaskSpec(is_causal=True)).out, expected.out)


def test_the_reference_agrees_with_torch():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8).double(), torch.randn(1, 2, 9, 8).double(), torch.randn(1, 2, 9, 8).double()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference.attend(q, k, v, MaskSpec(is_causal=True)).out, expected)


def test_a_pack_that_does_not_cover_the_rows_is_refused():
    q = torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attend(q, q, q, PlanKind.DENSE, MaskSpec(cu_seqlens_q=(0, 8), cu_seqlens_k=(0, 9)))
