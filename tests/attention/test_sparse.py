"""What sparse attention does not read, what stands for it, and that both are what the selection says."""

from dataclasses import replace

import pytest
import torch

from service.attention.dispatch import attend
from service.attention.masks import MaskSpec
from service.attention.output import Scoring
from service.attention.reference import visible
from service.attention.scores import LOG2_E
from service.attention.sparse import attend as sparse
from service.attention.sparse import selection
from service.attention.sparse.selection import Selection, SelectionSettings, select
from service.attention.synthetic import InputShape, diffuse, plant_needle, structured
from service.core.plan import PlanKind

L = 2048
BANDS = MaskSpec(is_causal=True, window=(1500, -1))


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def read_by_hand(chosen: Selection, mask: MaskSpec, query_length: int, key_length: int) -> torch.Tensor:
    """[B, Hq, Lq, Lk] bool: the pairs that a selection reads, one definition after the other."""
    batch, heads = chosen.keep.shape[:2]
    size = chosen.layout.block_size
    whole = chosen.keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :query_length, :key_length].clone()
    for b in range(batch):
        for h in range(heads):
            whole[b, h, :, chosen.moments[b][h].outliers] = True
    return whole & visible(mask, batch, query_length, key_length)


def stand_ins_by_hand(chosen: Selection, query_length: int) -> torch.Tensor:
    """[B, Hq, Lq, nK] bool: the blocks whose moments stand beside what a row reads."""
    layout = chosen.layout
    size = layout.rows.shape[1]
    stands = torch.zeros_like(chosen.keep)
    for b, heads in enumerate(chosen.summarized):
        for h, parts in enumerate(heads):
            for part in parts:
                stands[b, h, part.blocks, part.columns] = True
    return (stands & ~chosen.keep & layout.whole()).repeat_interleave(size, 2)[:, :, :query_length]


def attend_by_hand(q, k, v, chosen: Selection, read: torch.Tensor, stands: torch.Tensor):
    """Softmax over the pairs read and the centroids, in float64 -> (out, lse, lse of what was read)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double() * q.shape[3] ** -0.5, *(x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT).masked_fill(~read, -torch.inf)
    estimates = torch.full(stands.shape, -torch.inf, dtype=torch.float64)
    values = torch.zeros(*stands.shape[:2], stands.shape[3], v.shape[3], dtype=torch.float64)
    for b, heads in enumerate(chosen.moments):
        for h, own in enumerate(heads):
            bits = q[b, h] * LOG2_E
            spread = bits.square() @ own.profile.double()
            told = bits @ own.centroid.double().T + spread[:, None] * own.size.double() + own.log_weight.double()
            estimates[b, h], values[b, h] = told / LOG2_E, own.value.double()
    estimates.masked_fill_(~stands, -torch.inf)
    both = torch.cat((scores, estimates), 3)
    weights = both.softmax(3).nan_to_num(0.0)
    return weights @ torch.cat((v, values), 2), both.logsumexp(3), scores.logsumexp(3)


SHAPES = {
    "causal": (MaskSpec(is_causal=True), 300, 300),
    "bidirectional": (MaskSpec(), 300, 300),
    "cross": (MaskSpec(), 70, 300),
    "offset": (MaskSpec(is_causal=True), 70, 300),
    "window": (MaskSpec(is_causal=True, window=(90, -1)), 300, 300),
    "top left": (MaskSpec(is_causal=True, causal_alignment="top_left"), 300, 200),
    "beyond": (MaskSpec(is_causal=True, causal_alignment=-100), 300, 300),
    "one row": (MaskSpec(is_causal=True), 1, 300),
}


@pytest.mark.parametrize("epsilon", [0.03, 0.5])
@pytest.mark.parametrize("name", SHAPES)
def test_execution_is_what_the_selection_says(name, epsilon, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE_STRIDE", 4)
    mask, query_length, key_length = SHAPES[name]
    q, k, v = structured(InputShape(2, 4, 2, 300, 16), seed=3, topic_tokens=40)
    q, k, v = q[:, :, 300 - query_length :], k[:, :, :key_length], v[:, :, :key_length]
    chosen = select(q, k, v, mask, SelectionSettings(32, epsilon))
    output = sparse.attend(q, k, v, mask, chosen)
    read, stands = read_by_hand(chosen, mask, query_length, key_length), stand_ins_by_hand(chosen, query_length)
    assert output.pairs_scored == int(read.sum()) + int(stands.sum())
    assert chosen.visible == 8 * int(visible(mask, 1, query_length, key_length).sum())
    out, lse, lse_read = attend_by_hand(q, k, v, chosen, read, stands)
    torch.testing.assert_close(output.out, out.float(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.lse, lse.float(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.lse_read, lse_read.float(), atol=2e-5, rtol=1e-4)
    if name in ("causal", "bidirectional", "cross"):
        assert not chosen.keep.all()
        assert stands.any()


def test_ragged_lengths_are_each_alone():
    q, k, v = structured(InputShape(2, 4, 2, 300, 16), seed=3, topic_tokens=40)
    whole = attend(q, k, v, PlanKind.SPARSE, MaskSpec(kv_lengths=torch.tensor([300, 111])))
    short = attend(q[1:], k[1:, :, :111], v[1:, :, :111], PlanKind.SPARSE, MaskSpec())
    torch.testing.assert_close(whole.out[1:], short.out)
    torch.testing.assert_close(whole.lse_read[1:], short.lse_read)


@pytest.mark.parametrize("mask", [MaskSpec(is_causal=True), MaskSpec(), BANDS], ids=["causal", "full", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topic_tokens", [200, 256])
def test_structure_is_found(mask, dtype, topic_tokens):
    q, k, v = structured(InputShape(1, 4, 2, L, 64), dtype, seed=1, topic_tokens=topic_tokens)
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.3))
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert chosen.density < 0.3
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.02


def test_moments_stand_for_what_is_not_read():
    """The same blocks, dropped instead: the error that selection by moments is not about."""
    q, k, v = structured(InputShape(1, 4, 2, L, 64), seed=1)
    mask = MaskSpec(is_causal=True)
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.5))
    exact = attend(q, k, v, PlanKind.DENSE, mask).out
    with_moments = relative(sparse.attend(q, k, v, mask, chosen).out, exact)
    dropped = relative(sparse.attend(q, k, v, mask, replace(chosen, moments=(), summarized=())).out, exact)
    assert with_moments < 0.25 * dropped


def test_epsilon_steers_the_error():
    q, k, v = structured(InputShape(1, 4, 4, L, 64), seed=1)
    mask = MaskSpec(is_causal=True)
    exact = attend(q, k, v, PlanKind.DENSE, mask).out
    errors, densities = [], []
    for epsilon in (1.0, 0.3, 0.1, 0.03, 0.01):
        chosen = select(q, k, v, mask, SelectionSettings(64, epsilon))
        errors.append(relative(sparse.attend(q, k, v, mask, chosen).out, exact))
        densities.append(chosen.density)
    assert errors == sorted(errors, reverse=True)
    assert densities == sorted(densities)
    assert errors[0] > 10 * errors[-1]


@pytest.mark.parametrize("topic_tokens", [100, 256])
@pytest.mark.parametrize("at", [5, 63, 64, 700, 1300])
def test_a_single_needle_is_not_diluted(at, topic_tokens):
    """At a block's edge, in its middle, in a block that is the border of two topics."""
    q, k, v = structured(InputShape(1, 2, 2, L, 64), seed=2, needles=0, topic_tokens=topic_tokens)
    rows = (1400, 1777, 2047)
    plant_needle(q, k, v, at, rows)
    mask = MaskSpec(is_causal=True)
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.3))
    out = sparse.attend(q, k, v, mask, chosen).out[:, :, list(rows)]
    torch.testing.assert_close(out, v[:, :, at : at + 1].expand_as(out), atol=0.02, rtol=0)


def test_a_needle_in_the_diagonal_block_is_read():
    q, k, v = structured(InputShape(1, 2, 2, L, 64), seed=2, needles=0)
    plant_needle(q, k, v, 1290, (1300,))
    mask = MaskSpec(is_causal=True)
    out = sparse.attend(q, k, v, mask, select(q, k, v, mask, SelectionSettings(64, 0.3))).out[:, :, 1300]
    torch.testing.assert_close(out, v[:, :, 1290], atol=0.02, rtol=0)


@pytest.mark.parametrize("length", [512, L])
@pytest.mark.parametrize("mask", [MaskSpec(is_causal=True), MaskSpec()], ids=["causal", "full"])
def test_diffuse_inputs_are_not_sparse(mask, length):
    q, k, v = diffuse(InputShape(1, 2, 2, length, 64))
    assert select(q, k, v, mask, SelectionSettings(128, 0.3)).density > 0.9


ADVERSARIES = ["all outliers", "one giant key", "identical keys", "zero values", "opposite halves", "ragged"]


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_inputs_are_right_or_read(name):
    """Either the error is small, or the selection says that the input is not sparse."""
    q, k, v = structured(InputShape(1, 2, 2, 1000 if name == "ragged" else 1024, 32), seed=4, topic_tokens=128)
    draw = torch.Generator().manual_seed(0)
    match name:
        case "all outliers":
            k = 12 * torch.nn.functional.normalize(torch.randn(k.shape, generator=draw), dim=3)
        case "one giant key":
            k[:, :, 300] *= 100
        case "identical keys":
            k = k[:, :, :1].expand_as(k).clone()
        case "zero values":
            v = torch.zeros_like(v)
        case "opposite halves":
            k[:, :, ::2] *= -1
    for mask in (MaskSpec(is_causal=True), MaskSpec()):
        exact = attend(q, k, v, PlanKind.DENSE, mask).out
        chosen = select(q, k, v, mask, SelectionSettings(64, 0.1))
        out = sparse.attend(q, k, v, mask, chosen).out
        assert chosen.density > 0.5 or (out - exact).norm() <= 0.02 * exact.norm()


def test_identical_keys_need_not_be_read():
    """Blocks of equal keys have no spread: their means are exact, whatever the queries are."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 16, 16).repeat_interleave(32, 2)
    q, v = 3 * torch.randn(1, 1, 512, 16), torch.randn(1, 1, 512, 16)
    chosen = select(q, k, v, MaskSpec(), SelectionSettings(32, 0.1))
    assert not chosen.keep.any()
    exact = attend(q, k, v, PlanKind.DENSE, MaskSpec())
    output = sparse.attend(q, k, v, MaskSpec(), chosen)
    assert relative(output.out, exact.out) < 0.02  # NEGLIGIBLE blocks may be left out altogether
    assert (output.lse - exact.lse).abs().max() < 0.02
    assert (output.lse_read == -torch.inf).all()


def test_spread_counts_where_the_centroid_says_nothing():
    """Half of a block's keys point along the query, half against it: its centroid is zero, its mass is nearly all."""
    along = torch.eye(16)[0]
    k = along.repeat(1, 1, 512, 1)  # a score of 1, and of +-6 in block 3
    k[0, 0, 192:256] = 6 * along * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    q = 4.0 * along.repeat(1, 1, 64, 1)
    keep = select(q, k, torch.randn(1, 1, 512, 16), MaskSpec(), SelectionSettings(64, 0.5)).keep[0, 0, 0]
    assert keep.tolist() == [False, False, False, True, False, False, False, False]


@pytest.mark.parametrize("by_head", [False, True])
def test_a_mask_of_keys_steers_the_selection(by_head):
    """The heaviest blocks are hidden: a selection that ignored the mask would keep those and drop what is left."""
    q, k, v = structured(InputShape(1, 2, 2, 1024, 32), seed=4, needles=0)
    attn_mask = torch.ones(1, 2, 1, 1024, dtype=torch.bool) if by_head else torch.ones(1024, dtype=torch.bool)
    attn_mask[..., :512] = False
    attn_mask[..., 700:710] = False
    if by_head:
        attn_mask[:, 1, :, :100] = True
    mask = MaskSpec(attn_mask=attn_mask)
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.05))
    assert not chosen.keep[:, 0, :, :8].any()
    assert chosen.density < 0.7
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.02


def test_a_bias_steers_the_selection():
    """Attention with linear biases (ALiBi): distance alone makes diffuse inputs sparse."""
    q, k, v = diffuse(InputShape(1, 2, 2, 1024, 32))
    place = torch.arange(1024.0)
    mask = MaskSpec(is_causal=True, attn_mask=-0.1 * (place[:, None] - place).abs())
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.02))
    assert chosen.density < 0.4
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    assert relative(sparse.attend(q, k, v, mask, chosen).out, exact.out) < 0.02


def test_nan_is_kept_not_dropped():
    q, k, v = structured(InputShape(1, 1, 1, 512, 16), topic_tokens=64)
    q[0, 0, 100] = torch.nan  # of the rows looked at
    assert select(q, k, v, MaskSpec(), SelectionSettings(64, 0.1)).keep[0, 0, 1].all()


def test_partial_blocks_are_kept_and_invisible_ones_never():
    q, k, v = structured(InputShape(1, 1, 1, 512, 16), topic_tokens=64)
    keep = select(q, k, v, MaskSpec(is_causal=True, window=(100, -1)), SelectionSettings(64, 0.5)).keep[0, 0]
    assert keep.diagonal().all()
    assert keep.diagonal(-2).all()  # the window's left edge
    assert not keep.triu(1).any()
    assert not keep.tril(-3).any()


def test_tiles_do_not_change_the_answer(monkeypatch):
    monkeypatch.setattr(selection, "NEGLIGIBLE", 0.0)  # decided tile by tile
    q, k, v = structured(InputShape(2, 4, 2, 512, 16), topic_tokens=64)
    mask = MaskSpec(is_causal=True)
    whole = select(q, k, v, mask, SelectionSettings(32, 0.2))
    expected = sparse.attend(q, k, v, mask, whole)
    monkeypatch.setattr(selection, "ESTIMATE_TILE_BYTES", 1)
    monkeypatch.setattr(sparse, "SPARSE_TILE_BYTES", 1)
    calls = []
    parts = select(q, k, v, mask, SelectionSettings(32, 0.2), checkpoint=lambda: calls.append(1))
    assert torch.equal(whole.keep, parts.keep)
    assert whole.visible == parts.visible
    output = sparse.attend(q, k, v, mask, parts, checkpoint=lambda: calls.append(1))
    torch.testing.assert_close(output.out, expected.out)
    assert len(calls) > 500


def test_risky_rows_are_worse_than_the_rest():
    q, k, v = structured(InputShape(1, 4, 4, L, 64), seed=5)
    mask = MaskSpec(is_causal=True)
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.5))
    exact = attend(q, k, v, PlanKind.DENSE, mask)
    output = sparse.attend(q, k, v, mask, chosen)
    error = (output.out - exact.out).norm(dim=3)
    b, h, rows = output.risky_rows.unbind(1)
    assert error[b, h, rows].mean() > 2 * error.mean()
    assert len(output.risky_rows) == 4 * sparse.RISKY_ROWS


@pytest.mark.parametrize("softcap", [2.0, 10.0])
def test_softcap_caps_the_estimate_too(softcap):
    q, k, v = structured(InputShape(1, 2, 2, 1024, 32), seed=6)
    mask = MaskSpec(is_causal=True)
    exact = attend(q, k, v, PlanKind.DENSE, mask, scoring=Scoring(softcap=softcap))
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.05), scoring=Scoring(softcap=softcap))
    assert relative(sparse.attend(q, k, v, mask, chosen, scoring=Scoring(softcap=softcap)).out, exact.out) < 0.02


def test_grouped_heads_share_their_keys():
    q, k, v = structured(InputShape(1, 6, 2, 1024, 32), seed=7)
    mask = MaskSpec(is_causal=True)
    grouped = sparse.attend(q, k, v, mask, select(q, k, v, mask, SelectionSettings(64, 0.2)))
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    repeated = sparse.attend(q, k, v, mask, select(q, k, v, mask, SelectionSettings(64, 0.2)))
    torch.testing.assert_close(grouped.out, repeated.out)
    assert grouped.pairs_scored == repeated.pairs_scored


def test_hidden_keys_leave_no_trace():
    """However large what lies behind a mask: neither moments, outliers nor the scale of the values know of it."""
    q, k, v = structured(InputShape(1, 2, 2, 512, 32), seed=8, topic_tokens=64)
    hidden = torch.zeros(512, dtype=torch.bool)
    hidden[100::37] = True
    mask = MaskSpec(attn_mask=~hidden)
    clean = select(q, k, v, mask, SelectionSettings(64, 0.3))
    expected = sparse.attend(q, k, v, mask, clean)
    k, v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = 1e6, 1e6
    chosen = select(q, k, v, mask, SelectionSettings(64, 0.3))
    assert torch.equal(chosen.keep, clean.keep)
    torch.testing.assert_close(sparse.attend(q, k, v, mask, chosen).out, expected.out)
