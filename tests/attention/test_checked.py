"""The promise: no answer is further off than allowed without being replaced, and every replacement is told."""

import pytest
import torch

from service.attention import attend, sparse
from service.attention.checked import attend_checked
from service.attention.masks import MaskSpec
from service.attention.pairs import visible_pairs
from service.attention.workloads import diffuse, structured
from service.core import ErrorReport, PlanKind

from .helpers import plan_of

CAUSAL = MaskSpec(is_causal=True)


@pytest.fixture(scope="module")
def inputs():
    return structured(1, 4, 2, 2048, 64, seed=1)


@pytest.mark.parametrize("kind", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_exact_plans_just_run(inputs, kind):
    checked = attend_checked(*inputs, plan_of(kind), CAUSAL, max_error=0.02)
    assert torch.equal(checked.out, attend(*inputs, kind, CAUSAL).out)
    assert checked.error == ErrorReport()
    assert (checked.kind, checked.density, checked.reason) == (kind, None, "")
    assert checked.pairs_scored == 4 * 2048 * 2049 // 2


def test_sparse_is_measured(inputs):
    checked = attend_checked(*inputs, plan_of("sparse", 64, 0.02), CAUSAL, max_error=0.02, max_density=0.6)
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
    tensors = diffuse(1, 2, 2, 1024, 32)
    checked = attend_checked(*tensors, plan_of("sparse", 64, 0.02), CAUSAL, max_error=0.02)
    assert (checked.kind, checked.error, checked.density) == (PlanKind.DENSE, ErrorReport(), None)
    assert checked.reason.startswith("predicted density ")
    assert checked.reason.endswith(" > 0.5")
    assert checked.pairs_scored == 2 * visible_pairs(1024, 1024, is_causal=True)


def test_forced_sparse_runs_even_where_it_saves_nothing():
    tensors = diffuse(1, 2, 2, 1024, 32)
    checked = attend_checked(*tensors, plan_of("sparse", 64, 0.02), CAUSAL, max_error=0.05, forced=True)
    assert checked.kind is PlanKind.SPARSE
    assert checked.density is not None
    assert checked.density > 0.9
    assert checked.error.relative_l2_upper <= 0.05


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("kind", [PlanKind.DENSE, PlanKind.CHUNKED])
def test_over_the_bound_is_recomputed_and_told(inputs, forced, kind):
    plan = plan_of("sparse", 64, 0.5)
    checked = attend_checked(*inputs, plan, CAUSAL, max_error=1e-3, forced=forced, exact_kind=kind, max_density=1.0)
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
        MaskSpec(attn_mask=torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)) > 0.2),
    ],
    ids=["ragged", "window", "mask"],
)
def test_masks_and_ragged_batches(mask):
    tensors = structured(3, 2, 1, 1024, 32, torch.bfloat16, seed=3, topic_tokens=128)
    checked = attend_checked(*tensors, plan_of("sparse", 64, 0.02), mask, max_error=0.03, forced=True)
    exact = attend(*tensors, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    assert float((checked.out.double() - exact.out.double()).norm() / exact.out.double().norm()) < 0.03
    if mask.kv_lengths is not None:
        assert not checked.out[1].any()
        assert (checked.lse[1] == -torch.inf).all()


def test_packed_sequences(inputs):
    cu = (0, 700, 2048)
    mask = MaskSpec(is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    checked = attend_checked(*inputs, plan_of("sparse", 64, 0.02), mask, max_error=0.02, forced=True)
    exact = attend(*inputs, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    assert float((checked.out - exact.out).norm() / exact.out.norm()) < 0.02


def test_sparse_cannot_check_itself(inputs):
    with pytest.raises(ValueError, match="exact_kind"):
        attend_checked(*inputs, plan_of("sparse"), CAUSAL, max_error=0.1, exact_kind=PlanKind.SPARSE)
