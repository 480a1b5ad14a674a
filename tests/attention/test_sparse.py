"""What sparse attention leaves out, on inputs that have structure, and that it leaves out nothing else."""

from dataclasses import replace

import pytest
import torch

from service.attention import attend, selection, sparse
from service.attention.masks import MaskSpec
from service.attention.selection import Selection, select
from service.attention.workloads import diffuse, plant_needle, structured
from service.core import PlanKind

L = 2048
BANDS = MaskSpec(is_causal=True, window=(1500, -1))


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def visible_by_hand(chosen: Selection, mask: MaskSpec, query_length: int, key_length: int) -> torch.Tensor:
    """[B, Hq, Lq, Lk] bool: the pairs that a selection computes, one definition after the other."""
    from service.attention.reference import visible

    batch, heads = chosen.keep.shape[:2]
    size = chosen.block_size
    whole = chosen.keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :query_length, :key_length].clone()
    group = heads // chosen.outliers.shape[1]
    for b in range(batch):
        for h in range(heads):
            columns = chosen.outliers[b, h // group]
            whole[b, h, :, columns[columns >= 0]] = True
    return whole & visible(mask, batch, query_length, key_length)


SHAPES = {
    "causal": (MaskSpec(is_causal=True), 300, 300),
    "bidirectional": (MaskSpec(), 300, 300),
    "cross": (MaskSpec(), 70, 300),
    "offset": (MaskSpec(is_causal=True), 70, 300),
    "window": (MaskSpec(is_causal=True, window=(90, -1)), 300, 300),
    "ragged": (MaskSpec(kv_lengths=torch.tensor([300, 111])), 300, 300),
    "one row": (MaskSpec(is_causal=True), 1, 300),
}


@pytest.mark.parametrize("name", SHAPES)
def test_execution_is_exact_over_the_selected_pairs(name):
    mask, query_length, key_length = SHAPES[name]
    q, k, v = structured(2, 4, 2, 300, 16, seed=3, topic_tokens=40)
    q = q[:, :, 300 - query_length :]
    chosen = select(q, k, mask, 32, 0.05)
    output = sparse.attend(q, k, v, mask, chosen)
    pairs = visible_by_hand(chosen, mask, query_length, key_length)
    assert output.pairs_scored == int(pairs.sum())
    expected = attend(q, k, v, PlanKind.CHUNKED, replace(mask, attn_mask=pairs))
    torch.testing.assert_close(output.out, expected.out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.lse, expected.lse, atol=2e-5, rtol=1e-4)
    assert 0 < chosen.density <= 1
    if name in ("causal", "bidirectional"):
        assert chosen.density < 1


@pytest.mark.parametrize("mask", [MaskSpec(is_causal=True), MaskSpec(), BANDS], ids=["causal", "full", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structure_is_found(mask, dtype):
    q, k, v = structured(1, 4, 2, L, 64, dtype, seed=1)
    chosen = select(q, k, mask, 64, 0.02)
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert chosen.density < 0.6
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.02


@pytest.mark.parametrize("at", [5, 700, 1300])
def test_a_single_needle_is_not_diluted(at):
    q, k, v = structured(1, 2, 2, L, 64, seed=2, needles=0)
    rows = (1400, 1777, 2047)
    plant_needle(q, k, v, at, rows)
    mask = MaskSpec(is_causal=True)
    chosen = select(q, k, mask, 64, 0.02)
    out = sparse.attend(q, k, v, mask, chosen).out[:, :, list(rows)]
    torch.testing.assert_close(out, v[:, :, at : at + 1].expand_as(out), atol=0.02, rtol=0)


def test_diffuse_inputs_are_not_sparse():
    q, k, _ = diffuse(1, 2, 2, L, 64)
    assert select(q, k, MaskSpec(is_causal=True), 128, 0.02).density > 0.9


def test_every_row_keeps_its_promise_where_the_estimate_is_exact():
    """Blocks of equal keys have no variance: the estimated share is the true one and epsilon bounds it."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 16, 16).repeat_interleave(32, 2)
    q = 3 * torch.randn(1, 1, 16, 16).repeat_interleave(32, 2) + 0.1 * torch.randn(1, 1, 512, 16)
    v = torch.randn(1, 1, 512, 16)
    chosen = select(q, k, MaskSpec(), 32, 0.1)
    assert chosen.keep.any(-1).all()
    assert not chosen.keep.all()
    exact = attend(q, k, v, PlanKind.DENSE, MaskSpec())
    kept = torch.exp(sparse.attend(q, k, v, MaskSpec(), chosen).lse - exact.lse)
    assert float(kept.min()) > 0.9 - 1e-4
    assert float(kept.min()) < 0.999


def test_spread_counts_where_the_centroid_says_nothing():
    """Half of a block's keys point along the query, half against it: its centroid is zero, its mass is nearly all."""
    along = torch.eye(16)[0]  # one channel: a variance per channel knows nothing of directions between channels
    k = along.repeat(1, 1, 512, 1)  # a score of 1, and of +-6 in block 3
    k[0, 0, 192:256] = 6 * along * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    q = 4.0 * along.repeat(1, 1, 64, 1)
    keep = select(q, k, MaskSpec(), 64, 0.2).keep[0, 0, 0]
    assert keep.tolist() == [False, False, False, True, False, False, False, False]


def test_a_boolean_mask_steers_the_selection():
    """The heaviest blocks are hidden: a selection that ignored the mask would keep those and drop what is left."""
    q, k, v = structured(1, 2, 2, 1024, 32, seed=4, needles=0)
    attn_mask = torch.ones(1024, dtype=torch.bool)
    attn_mask[:512] = False
    mask = MaskSpec(attn_mask=attn_mask)
    chosen = select(q, k, mask, 64, 0.02)
    assert not chosen.keep[..., :8].any()
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.02


def test_a_bias_steers_the_selection():
    """Attention with linear biases (ALiBi): distance alone makes diffuse inputs sparse."""
    q, k, v = diffuse(1, 2, 2, 1024, 32)
    place = torch.arange(1024.0)
    mask = MaskSpec(is_causal=True, attn_mask=-0.1 * (place[:, None] - place).abs())
    chosen = select(q, k, mask, 64, 0.02)
    assert chosen.density < 0.3
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.05


def test_nan_is_kept_not_dropped():
    q, k, _ = structured(1, 1, 1, 512, 16, topic_tokens=64)
    q[0, 0, 100] = torch.nan
    assert select(q, k, MaskSpec(), 64, 0.1).keep[0, 0, 1].all()


def test_partial_blocks_are_kept_and_invisible_ones_never():
    q, k, _ = structured(1, 1, 1, 512, 16, topic_tokens=64)
    keep = select(q, k, MaskSpec(is_causal=True, window=(100, -1)), 64, 0.5).keep[0, 0]
    assert keep.diagonal().all()
    assert keep.diagonal(-2).all()  # the window's left edge
    assert not keep.triu(1).any()
    assert not keep.tril(-3).any()


def test_scratch_does_not_change_the_selection(monkeypatch):
    q, k, _ = structured(2, 4, 2, 512, 16, topic_tokens=64)
    whole = select(q, k, MaskSpec(is_causal=True), 32, 0.05)
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(selection, "MOMENTS_BYTES", 1)
    parts = select(q, k, MaskSpec(is_causal=True), 32, 0.05)
    assert torch.equal(whole.keep, parts.keep)
    assert torch.equal(whole.outliers, parts.outliers)
    assert (whole.pairs, whole.visible) == (parts.pairs, parts.visible)


def test_risky_rows_are_worse_than_the_rest():
    q, k, v = structured(1, 4, 4, L, 64, seed=5)
    mask = MaskSpec(is_causal=True)
    chosen = select(q, k, mask, 64, 0.1)
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    lost = 1 - torch.exp(sparse.attend(q, k, v, mask, chosen).lse - exact.lse)
    b, h, rows = chosen.risky_rows.unbind(1)
    assert lost[b, h, rows].mean() > 2 * lost.mean()
    assert len(chosen.risky_rows) == 4 * selection.RISKY_ROWS


def test_softcap_caps_the_estimate_too():
    q, k, v = structured(1, 2, 2, 1024, 32, seed=6)
    mask = MaskSpec(is_causal=True)
    exact = attend(q, k, v, PlanKind.DENSE, mask, softcap=2.0)
    chosen = select(q, k, mask, 64, 0.02, None, 2.0)
    assert relative(sparse.attend(q, k, v, mask, chosen, softcap=2.0).out, exact.out) < 0.02
    # scores within [-2, 2] leave little to drop, which an uncapped estimate would not see
    assert chosen.density > select(q, k, mask, 64, 0.02).density
