"""The promise: no answer is further off than allowed without being replaced, and every replacement is told."""

from typing import Any

import pytest
import torch

from service.attention.dispatch import attend
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.pairs import visible_pairs
from service.attention.sparse import attend as sparse
from service.attention.sparse import bounded_error
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound, tighter
from service.attention.sparse.selection import BlockSelector, SelectionSettings, select
from service.attention.synthetic import InputShape, diffuse, structured
from service.core.answer import ErrorReport
from service.core.plan import PlanKind

CAUSAL = MaskSpec(is_causal=True)


@pytest.fixture(scope="module")
def inputs():
    return structured(InputShape(1, 4, 2, 2048, 64), seed=1)


def bound_of(epsilon: float, max_error: float, exact_kind: PlanKind = PlanKind.DENSE, **fields: Any) -> ErrorBound:
    return ErrorBound(max_error, exact_kind, epsilon, block_size=64, **fields)


def forced(epsilon: float, max_error: float, **fields: Any) -> ErrorBound:
    return bound_of(epsilon, max_error, max_density=None, **fields)


def test_sparse_is_measured(inputs):
    checked = attend_with_error_bound(*inputs, CAUSAL, bound_of(0.02, 0.02, max_density=0.6))
    exact = attend(*inputs, PlanKind.DENSE, CAUSAL)
    true = float((checked.out - exact.out).norm() / exact.out.norm())
    assert checked.kind is PlanKind.SPARSE
    assert checked.error.kind == "measured"
    assert 0 < true <= checked.error.relative_l2_upper <= 0.02
    assert checked.density is not None
    scored_sparse = round(checked.density * 4 * 2048 * 2049 // 2)
    assert scored_sparse < checked.pairs_scored < scored_sparse + 4 * 63 * 2048


def test_too_dense_goes_exact_before_any_sparse_work(monkeypatch):
    monkeypatch.setattr(sparse, "attend", None)
    tensors = diffuse(InputShape(1, 2, 2, 1024, 32))
    checked = attend_with_error_bound(*tensors, CAUSAL, bound_of(0.02, 0.02))
    assert (checked.kind, checked.error, checked.density) == (PlanKind.DENSE, ErrorReport(), None)
    assert checked.reason.startswith("predicted density ")
    assert checked.reason.endswith(" > 0.5 with epsilon 0.02")
    assert checked.pairs_scored == 2 * visible_pairs(1024, 1024, is_causal=True)


def test_forced_sparse_runs_even_where_it_saves_nothing():
    tensors = diffuse(InputShape(1, 2, 2, 1024, 32))
    checked = attend_with_error_bound(*tensors, CAUSAL, forced(0.02, 0.05))
    assert checked.kind is PlanKind.SPARSE
    assert checked.density is not None
    assert checked.density > 0.9
    assert checked.error.relative_l2_upper <= 0.05


@pytest.mark.parametrize("max_density", [None, 1.0])
@pytest.mark.parametrize("kind", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_over_the_bound_is_recomputed_and_told(inputs, max_density, kind):
    bound = bound_of(0.5, 1e-3, kind, max_density=max_density)
    checked = attend_with_error_bound(*inputs, CAUSAL, bound)
    assert torch.equal(checked.out, attend(*inputs, kind, CAUSAL).out)
    assert (checked.kind, checked.error.kind, checked.error.fallback) == (kind, "exact", True)
    assert checked.error.rejected_relative_l2_upper is not None
    assert checked.error.rejected_relative_l2_upper > 1e-3
    assert "> max_error 0.001" in checked.reason
    assert checked.pairs_scored > 4 * visible_pairs(2048, 2048, is_causal=True)


@pytest.mark.parametrize(
    "mask",
    [
        MaskSpec(kv_lengths=torch.tensor([1024, 0, 700])),
        MaskSpec(is_causal=True, window=(600, -1)),
        MaskSpec(attn_mask=torch.rand(1024, generator=torch.Generator().manual_seed(0)) > 0.2),
    ],
    ids=["ragged", "window", "mask"],
)
def test_masks_and_ragged_batches(mask):
    tensors = structured(InputShape(3, 2, 1, 1024, 32), torch.bfloat16, seed=3, topic_tokens=128)
    checked = attend_with_error_bound(*tensors, mask, forced(0.02, 0.03))
    exact = attend(*tensors, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    assert float((checked.out.double() - exact.out.double()).norm() / exact.out.double().norm()) < 0.03
    if mask.kv_lengths is not None:
        assert not checked.out[1].any()
        assert (checked.lse[1] == -torch.inf).all()


def test_a_tighter_epsilon_is_tried_once_and_told(inputs):
    first = attend_with_error_bound(*inputs, CAUSAL, bound_of(1.0, 1.0, max_density=1.0))
    assert (first.epsilon, first.reason) == (1.0, "")
    bound = first.error.relative_l2_upper / 2
    checked = attend_with_error_bound(*inputs, CAUSAL, bound_of(1.0, bound, max_density=1.0))
    exact = attend(*inputs, PlanKind.DENSE, CAUSAL)
    assert checked.kind is PlanKind.SPARSE
    assert checked.epsilon == pytest.approx(tighter(2.0))
    assert checked.error.relative_l2_upper <= bound
    assert not checked.error.fallback
    assert float((checked.out - exact.out).norm() / exact.out.norm()) < bound
    assert checked.reason.startswith(f"measured error {first.error.relative_l2_upper:.3g} > max_error {bound:g} with")
    assert checked.pairs_scored > first.pairs_scored + checked.density * 4 * 2048 * 2049 // 2


def test_a_mask_of_every_rows_own_goes_exact_rather_than_wrong():
    tensors = structured(InputShape(1, 2, 1, 1024, 32), seed=3, topic_tokens=128)
    mask = MaskSpec(attn_mask=torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)) > 0.2)
    checked = attend_with_error_bound(*tensors, mask, forced(0.3, 0.03, needs_certificate=True))
    assert (checked.kind, checked.error.fallback) == (PlanKind.DENSE, True)
    assert checked.error.certified_unread is None


def clusters(draw: torch.Generator, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """16 tight clusters of 64 keys each, and queries near their own cluster."""
    centres = 8 * torch.nn.functional.normalize(torch.randn(1, heads, 16, 32, generator=draw), dim=3)
    key = centres.repeat_interleave(64, 2) + 0.02 * torch.randn(1, heads, 1024, 32, generator=draw)
    query = 2 * key + 0.1 * torch.randn(1, heads, 1024, 32, generator=draw)
    return query, key, torch.randn(1, heads, 1024, 32, generator=draw)


def test_what_is_certified_is_true():
    """Keys in tight clusters: their blocks' radii prove how little was left unread; spread keys prove nothing."""
    query, key, value = clusters(torch.Generator().manual_seed(0), heads=2)
    bound = forced(0.003, 0.1, needs_certificate=True)
    checked = attend_with_error_bound(query, key, value, CAUSAL, bound)
    scores = (query @ key.mT * 32**-0.5).masked_fill(~torch.ones(1024, 1024, dtype=torch.bool).tril(), -torch.inf)
    selection = select(query, key, value, CAUSAL, SelectionSettings(64, 0.003))
    output = sparse.attend(query, key, value, CAUSAL, selection)
    unread = float((1 - (output.lse_read - scores.logsumexp(3)).exp()).max())
    assert selection.density < 0.3
    assert 0 < unread <= checked.error.certified_unread < 0.5

    spread = attend_with_error_bound(*structured(InputShape(1, 2, 2, 1024, 32)), CAUSAL, bound)
    assert spread.kind is PlanKind.SPARSE
    assert spread.error.certified_unread is None


def test_a_certificate_is_computed_only_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(bounded_error, "unread_mass", None)
    query, key, value = clusters(torch.Generator().manual_seed(0), heads=2)
    checked = attend_with_error_bound(query, key, value, CAUSAL, forced(0.003, 0.1))
    assert checked.kind is PlanKind.SPARSE
    assert checked.error.certified_unread is None
    monkeypatch.undo()
    checked = attend_with_error_bound(query, key, value, CAUSAL, forced(0.003, 0.1, needs_certificate=True))
    assert checked.error.certified_unread is not None


def test_nothing_is_certified_of_a_row_that_read_nothing():
    """Equal scores everywhere: means are exact, nothing is read, and a padded end hides a block."""
    query, key, value = torch.zeros(1, 1, 512, 16), torch.randn(1, 1, 512, 16), torch.randn(1, 1, 512, 16)
    attn_mask = torch.arange(512) < 384
    for mask in (MaskSpec(), MaskSpec(attn_mask=attn_mask)):
        checked = attend_with_error_bound(query, key, value, mask, forced(0.1, 0.2, needs_certificate=True))
        assert checked.kind is PlanKind.SPARSE
        assert checked.error.recall == 0.0
        assert checked.error.certified_unread is None


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_certificates_hold_with_biases_and_caps(softcap):
    draw = torch.Generator().manual_seed(1)
    query, key, value = clusters(draw, heads=1)
    bias = torch.randn(1024, generator=draw)
    bias[::7] = -torch.inf
    bias[5] = -110.0  # its share of the block is too small for a number, its mass is not
    mask, bound = MaskSpec(attn_mask=bias), forced(0.003, 0.1, needs_certificate=True)
    options = {"scoring": Scoring(softcap=softcap)}
    checked = attend_with_error_bound(query, key, value, mask, bound, **options)
    selection = select(query, key, value, mask, SelectionSettings(64, 0.003), **options)
    output = sparse.attend(query, key, value, mask, selection, **options)
    exact = attend(query, key, value, PlanKind.CHUNKED, mask, **options)
    unread = float((1 - (output.lse_read - exact.lse).exp()).max())
    assert selection.density < 0.5
    assert checked.error.certified_unread is not None
    assert 0 < unread <= checked.error.certified_unread


def test_a_log_sum_exp_that_is_handed_out_is_held_to_the_bound():
    """Values of zero make every output right, and say nothing of the mass that moments stand for."""
    query, key, _ = structured(InputShape(1, 2, 2, 1024, 32), seed=3)
    value = torch.zeros_like(key)
    loose = attend_with_error_bound(query, key, value, CAUSAL, forced(1.0, 0.02))
    assert loose.kind is PlanKind.SPARSE
    assert loose.error.lse_error > 0.02
    strict = attend_with_error_bound(query, key, value, CAUSAL, forced(1.0, 0.02, needs_lse=True))
    exact = attend(query, key, value, PlanKind.DENSE, CAUSAL)
    assert float((strict.lse - exact.lse).abs().max()) < 0.02
    assert strict.error.fallback or strict.error.lse_error <= 0.02


def test_large_values_are_no_reason_to_fail():
    query, key, value = structured(InputShape(1, 1, 1, 512, 16), topic_tokens=64)
    checked = attend_with_error_bound(query, key, value * 1e25, CAUSAL, forced(0.1, 0.1))
    assert torch.isfinite(checked.out).all()


def test_packed_sequences(inputs):
    cu = (0, 700, 2048)
    mask = MaskSpec(is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    checked = attend_with_error_bound(*inputs, mask, forced(0.02, 0.02))
    exact = attend(*inputs, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    assert float((checked.out - exact.out).norm() / exact.out.norm()) < 0.02


def test_sparse_cannot_check_itself(inputs):
    with pytest.raises(ValueError, match="exact_kind"):
        attend_with_error_bound(*inputs, CAUSAL, bound_of(0.1, 0.1, PlanKind.SPARSE))


def six_heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On three key heads."""
    return structured(InputShape(1, 6, 3, 2048, 64), seed=1)


def test_a_head_that_would_read_too_much_is_exact_beside_sparse_ones(monkeypatch):
    query, key, value = six_heads()
    dense_heads = {}

    def predicted(selector, *_: object) -> float:
        return 0.9 if selector.index[1] in (1, 4) else 0.1

    monkeypatch.setattr(BlockSelector, "predicted_density", predicted)
    monkeypatch.setattr(bounded_error, "attend", lambda *a, **k: dense_heads.setdefault("out", attend(*a, **k)))
    checked = attend_with_error_bound(query, key, value, CAUSAL, bound_of(0.02, 0.05, max_density=0.7))
    assert checked.kind is PlanKind.SPARSE
    assert checked.reason == "heads 1, 4 exact: over density 0.7"
    assert dense_heads["out"].out.shape[1] == 2  # no other head was computed exactly
    exact = attend(query, key, value, PlanKind.DENSE, CAUSAL)
    torch.testing.assert_close(checked.out[:, (1, 4)], exact.out[:, (1, 4)], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(checked.lse[:, (1, 4)], exact.lse[:, (1, 4)], atol=1e-5, rtol=1e-5)
    error = float((checked.out - exact.out).norm() / exact.out.norm())
    assert 0 < error <= checked.error.relative_l2_upper <= 0.05
    others = attend_with_error_bound(query, key, value, CAUSAL, forced(0.02, 0.05))
    assert others.density is not None
    assert checked.density == pytest.approx(2 / 6 + others.density * 4 / 6, abs=0.05)


def test_the_density_of_a_head_is_predicted_from_some_of_its_rows():
    tensors = six_heads()
    settings = SelectionSettings(64, 0.02, max_density=None)
    whole = select(*tensors, CAUSAL, settings)
    densities = whole.keep[0].sum((1, 2)) / whole.layout.table(whole.layout.seen).sum()
    limit = float(densities.sort().values[2:4].mean())  # between the third and the fourth of six heads
    some = select(*tensors, CAUSAL, SelectionSettings(64, 0.02, max_density=limit))
    expected = {(0, head) for head in range(6) if densities[head] > limit}
    assert len(some.exact ^ expected) <= 1  # predicted, from six blocks of rows of each
    assert some.pairs > whole.pairs
    for head in range(6):
        if (0, head) not in some.exact:
            assert torch.equal(some.keep[0, head], whole.keep[0, head])


@pytest.mark.parametrize("lengths", [None, [2048, 1300]])
def test_heads_that_are_measured_too_far_off_are_replaced_alone(monkeypatch, lengths):
    batch = 1 if lengths is None else 2
    tensors = structured(InputShape(batch, 6, 3, 2048, 64), seed=1)
    mask = CAUSAL if lengths is None else MaskSpec(is_causal=True, kv_lengths=torch.tensor(lengths))
    run, seeds = sparse.attend, []

    def spoiled(*arguments: Any, **options: Any) -> Any:
        output = run(*arguments, **options)
        output.out[:, 4] *= 1.5  # one head goes wrong
        return output

    monkeypatch.setattr(sparse, "attend", spoiled)
    measure = bounded_error.measure
    monkeypatch.setattr(bounded_error, "measure", lambda *a, **k: seeds.append(k["seed"]) or measure(*a, **k))
    checked = attend_with_error_bound(*tensors, mask, bound_of(0.02, 0.05, max_density=1.0, seed=7))
    exact = attend(*tensors, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    assert checked.reason.startswith("head 4 exact: measured error ")
    assert seeds == [7, 8]  # the rows that chose the head do not judge the rest
    torch.testing.assert_close(checked.out[:, 4], exact.out[:, 4], atol=1e-6, rtol=1e-5)
    assert float((checked.out - exact.out).norm() / exact.out.norm()) <= checked.error.relative_l2_upper <= 0.05


def test_if_most_heads_are_too_far_off_all_are_replaced(monkeypatch):
    tensors = structured(InputShape(1, 4, 2, 2048, 64), seed=1)
    run = sparse.attend

    def spoiled(*arguments: Any, **options: Any) -> Any:
        output = run(*arguments, **options)
        output.out[:, :3] *= 1.5
        return output

    monkeypatch.setattr(sparse, "attend", spoiled)
    checked = attend_with_error_bound(*tensors, CAUSAL, bound_of(0.02, 0.05, max_density=1.0))
    assert (checked.kind, checked.error.fallback) == (PlanKind.DENSE, True)
    assert torch.equal(checked.out, attend(*tensors, PlanKind.DENSE, CAUSAL).out)


def test_masks_of_heads_go_with_their_heads(monkeypatch):
    query, key, value = structured(InputShape(1, 4, 2, 1024, 32), seed=2)
    bias = torch.zeros(1, 4, 1, 1024)
    bias[0, 2, 0, :100] = -torch.inf
    mask = MaskSpec(attn_mask=bias)
    monkeypatch.setattr(BlockSelector, "predicted_density", lambda selector, *_: float(selector.index[1] == 2))
    checked = attend_with_error_bound(query, key, value, mask, bound_of(0.02, 0.05, max_density=0.9))
    exact = attend(query, key, value, PlanKind.DENSE, mask)
    assert checked.reason == "head 2 exact: over density 0.9"
    torch.testing.assert_close(checked.out[:, 2], exact.out[:, 2], atol=1e-6, rtol=1e-5)
