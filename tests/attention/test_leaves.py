"""Leaves of keys that are alike: what is read is exact, the rest estimated, and the pilot knows what that costs."""

import math
from dataclasses import replace

import pytest
import torch

from service.attention.dispatch import attend
from service.attention.geometry import LEAF_BYTES, LeafShape, leaf_bytes, leaf_shape
from service.attention.inputs import AttentionInputs
from service.attention.masks import MaskSpec
from service.attention.output import Scoring, no_checkpoint
from service.attention.segments import split
from service.attention.sparse import by_leaf, pilot, segment_plan
from service.attention.sparse import leaves as leaves_module
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.attention.sparse.by_leaf import LeafAttention, tiles_of
from service.attention.sparse.leaves import HIDDEN, OUTLIERS, leaves_of, ordered
from service.attention.sparse.pilot import Choice, Curve, choose
from service.attention.sparse.selection import SelectionSettings
from service.attention.synthetic import InputShape, structured
from service.core.plan import PlanKind

from .helpers import clustered

CAUSAL = MaskSpec(is_causal=True)
SHAPE = LeafShape(64, 8, 32)
EVERYTHING, NOTHING = Choice(1.0, -1.0, 1.0), Choice(1.0, math.inf, 0.0)


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    monkeypatch.setattr(by_leaf, "leaf_shape", lambda length: SHAPE)


def prepared(inputs: AttentionInputs, max_density: float | None = None) -> LeafAttention:
    found = LeafAttention.of(inputs, tiles_of(inputs), 0.05, max_density, no_checkpoint)
    assert found is not None
    return found


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("mask", "query_length", "key_length"),
    [
        (CAUSAL, 700, 700),
        (MaskSpec(), 700, 700),
        (MaskSpec(), 500, 731),
        (CAUSAL, 530, 830),
        (MaskSpec(is_causal=True, causal_alignment="top_left"), 900, 700),
        (MaskSpec(is_causal=True, window=(400, -1)), 1200, 1200),
        (MaskSpec(window=(300, 200)), 1200, 1200),
    ],
    ids=["causal", "full", "cross", "causal cross", "top left", "causal window", "window"],
)
def test_reading_every_leaf_is_exact(mask, query_length, key_length):
    inputs = AttentionInputs(*clustered(query_length, key_length, batch=2), mask)
    exact = attend(*inputs.tensors, PlanKind.DENSE, mask)
    output = prepared(inputs).attend([EVERYTHING] * 8, no_checkpoint)
    torch.testing.assert_close(output.out, exact.out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.lse, exact.lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.lse_read, exact.lse, atol=1e-4, rtol=1e-4)


def test_reading_no_leaf_estimates_their_mass(monkeypatch):
    monkeypatch.setattr(LeafAttention, "_settle", lambda *_: 0)
    query, key, value = clustered()
    inputs = AttentionInputs(query / 8, key, value, CAUSAL)
    exact = attend(*inputs.tensors, PlanKind.DENSE, CAUSAL)
    output = prepared(inputs).attend([NOTHING] * 4, no_checkpoint)
    near = output.out[:, :, : SHAPE.segment]
    torch.testing.assert_close(near, exact.out[:, :, : SHAPE.segment], atol=1e-4, rtol=1e-4)
    assert output.lse_read is not None
    assert (output.lse_read < exact.lse - 0.2)[0, :, -1].all()  # only the segment, a leaf and outliers
    assert float((output.lse - exact.lse).abs().mean()) < 0.1
    assert 0.01 < relative(output.out, exact.out) < 0.3
    assert output.density < 0.45


def test_rows_that_read_the_least_are_computed_exactly():
    inputs = AttentionInputs(*clustered(), CAUSAL)
    exact = attend(*inputs.tensors, PlanKind.DENSE, CAUSAL)
    output = prepared(inputs).attend([NOTHING] * 4, no_checkpoint)
    assert output.lse_read is not None
    whole = (output.lse_read == output.lse)[0, 0, SHAPE.segment :]
    assert int(whole.sum()) == math.isqrt(700) // by_leaf.SETTLED + 1
    rows = whole.nonzero()[:, 0] + SHAPE.segment
    torch.testing.assert_close(output.out[0, 0, rows], exact.out[0, 0, rows], atol=1e-4, rtol=1e-4)


def test_a_key_far_above_what_its_leaf_promises_is_read_without_overflow(monkeypatch):
    monkeypatch.setattr(leaves_module, "_outliers", lambda keys: torch.tensor([0]))  # where all rows read them
    query, key, value = clustered()
    key[0, 0, 100] = 40 * query[0, 0, 600]  # 2^1000 times its neighbours' weight
    inputs = AttentionInputs(query, key, value, CAUSAL)
    exact = attend(*inputs.tensors, PlanKind.DENSE, CAUSAL)
    output = prepared(inputs).attend([EVERYTHING] * 4, no_checkpoint)
    torch.testing.assert_close(output.out[0, 0, 600], exact.out[0, 0, 600], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(output.out).all()


def test_the_pilot_foretells_the_error_of_its_rows(monkeypatch):
    monkeypatch.setattr(LeafAttention, "_settle", lambda *_: 0)
    monkeypatch.setattr(pilot, "TAIL", 0.0)
    inputs = AttentionInputs(*clustered(), CAUSAL)
    exact = attend(*inputs.tensors, PlanKind.DENSE, CAUSAL)
    leaves = prepared(inputs)
    rows = []
    for tile in pilot.pilots(leaves.tiles):
        start = tile.rows.start + (tile.rows.stop - tile.rows.start) // SHAPE.rows // 2 * SHAPE.rows
        step = SHAPE.rows // pilot.PILOT_ROWS
        rows += list(range(start + step // 2, min(start + SHAPE.rows, 700), step))
    for index in (0, 5, len(pilot.SHARES) - 1, len(pilot.SHARES) + 3):
        output = leaves.attend([curve.choices[index] for curve in leaves.curves], no_checkpoint)
        error = (output.out - exact.out)[0, :, rows].square().sum((1, 2))
        foretold = torch.tensor([curve.errors[index] for curve in leaves.curves])
        # a threshold is the risk of some leaf, which rounding may put on either side of it
        torch.testing.assert_close(error, foretold, rtol=0.15, atol=1e-4)
    norms = torch.tensor([curve.norm for curve in leaves.curves])
    torch.testing.assert_close(exact.out[0, :, rows].square().sum((1, 2)), norms, rtol=1e-3, atol=1e-4)


def test_leaves_hold_keys_that_are_alike_and_the_last_keys_of_a_segment():
    query, key, value = clustered(640, 640)
    leaves = leaves_of(query[0, :2], key[0, 0], value[0, 0], SHAPE, no_checkpoint)
    to_keys = torch.linalg.inv(leaves.to_queries).T
    mapped = key[0, 0] @ to_keys
    held = leaves.both.view(80, 8, 66)
    spread = float((held[..., :32] - held[..., :32].mean(1, keepdim=True)).square().mean())
    neighbours = mapped.view(80, 8, 32)
    assert spread < 0.7 * float((neighbours - neighbours.mean(1, keepdim=True)).square().mean())
    for segment in range(10):
        last = held[8 * segment + 7, :, :32].sort(0).values
        torch.testing.assert_close(last, mapped[64 * segment + 56 : 64 * segment + 64].sort(0).values)
    apart = held[..., 32] == HIDDEN
    assert int(apart.sum()) == len(leaves.outliers) == math.ceil(OUTLIERS * 640)
    torch.testing.assert_close(leaves.outlier_keys, mapped[leaves.outliers])


def test_an_order_keeps_segments_and_every_key():
    key = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    order = ordered(key, SHAPE, no_checkpoint)
    assert torch.equal(order.view(4, 64).sort(1).values.flatten(), torch.arange(256))


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e25])
def test_keys_and_queries_of_any_size_are_ordered(factor):
    query, key, value = clustered(640, 640)
    leaves = leaves_of(query[0, :2] * factor, key[0, 0] * factor, value[0, 0], SHAPE, no_checkpoint)
    assert torch.isfinite(leaves.to_queries).all()
    assert len(leaves.outliers) == math.ceil(OUTLIERS * 640)


def curve(*errors: float, norm: float = 1.0) -> Curve:
    """A head whose error falls to each of `errors` where it reads the first shares, and stays there."""
    shares = len(pilot.SHARES)
    padded = list(errors) + [errors[-1]] * (shares - len(errors))
    both = padded + [9.0] * shares * (len(pilot.FAITHS) - 1)
    return Curve([Choice(f, float(i), s) for f in pilot.FAITHS for i, s in enumerate(pilot.SHARES)], both, norm)


def test_the_budget_goes_where_it_saves_most():
    easy, hard = curve(1e-4, 1e-6), curve(*[0.02] * 14, 1e-3, 1e-4)
    chosen = choose([easy, hard], 0.1, 0.5)
    assert [choice and choice.share for choice in chosen] == [pilot.SHARES[1], pilot.SHARES[14]]
    loose = choose([easy, hard], 0.15, 0.5)
    assert [choice and choice.share for choice in loose] == [0.0, 0.0]


def test_a_head_that_gains_nothing_is_exact_unless_that_is_forbidden():
    hopeless = curve(*[0.5] * 16, 0.4)
    assert choose([hopeless, curve(1e-6)], 0.01, 0.5) == [None, curve(1e-6).choices[0]]
    forced = choose([hopeless], 0.01, None)
    assert forced[0] is not None
    assert forced[0].share == pilot.SHARES[16]
    assert choose([curve(math.nan)], 0.01, 0.5) == [None]


def test_no_head_may_read_more_than_its_limit():
    dear = curve(*[0.5] * 15, 1e-6)
    assert choose([dear], 0.01, 0.1) == [None]
    allowed = choose([dear], 0.01, 0.5)[0]
    assert allowed is not None
    assert allowed.share == pilot.SHARES[15]


def test_leaves_are_for_long_plain_inputs_within_memory(monkeypatch):
    tensors = clustered()
    assert tiles_of(AttentionInputs(*tensors, CAUSAL))
    assert not tiles_of(AttentionInputs(*tensors, CAUSAL, Scoring(softcap=30.0)))
    assert not tiles_of(AttentionInputs(*tensors, replace(CAUSAL, attn_mask=torch.ones(700, dtype=torch.bool))))
    assert not tiles_of(AttentionInputs(*clustered(400, 400), CAUSAL))
    assert not tiles_of(AttentionInputs(*tensors, MaskSpec(is_causal=True, window=(60, -1))))
    monkeypatch.setattr(by_leaf, "LEAF_BYTES", by_leaf.bytes_of(AttentionInputs(*tensors, CAUSAL)) - 1)
    assert not tiles_of(AttentionInputs(*tensors, CAUSAL))
    assert leaf_bytes((1, 9, 3, 2**16, 2**16), 64, 64) < LEAF_BYTES
    assert leaf_bytes((1, 32, 1, 2**13, 2**20), 128, 128) > LEAF_BYTES  # the pilot of one key head would be 16 GiB


def test_shapes_fit_blocks_of_rows():
    for length in (4096, 2**15, 2**18):
        shape = leaf_shape(length)
        assert shape.segment % shape.rows == 0
        assert shape.segment % shape.size == 0
        assert shape.rows % pilot.PILOT_ROWS == 0


def test_diffuse_inputs_are_refused_by_their_first_heads(monkeypatch):
    looked: list[int] = []
    curves = by_leaf.curves

    def counted(group, tiles, pause):
        looked.append(1)
        return curves(group, tiles, pause)

    monkeypatch.setattr(by_leaf, "curves", counted)
    draw = torch.Generator().manual_seed(0)
    inputs = AttentionInputs(*(torch.randn(1, 4, 700, 32, generator=draw) for _ in range(3)), CAUSAL)
    assert LeafAttention.of(inputs, tiles_of(inputs), 0.01, 0.5, no_checkpoint) is None
    assert len(looked) == by_leaf.LOOKED_AT


def test_inputs_with_topics_are_read_by_blocks_and_others_by_leaves():
    def by_blocks(tensors):
        inputs = AttentionInputs(*tensors, CAUSAL)
        planner = segment_plan.SegmentPlanner(None)
        (segment,) = split(*tensors, CAUSAL)
        return planner.plan(segment, inputs, SelectionSettings(32, 0.4, 0.5), 0.035).selection is not None

    assert by_blocks(structured(InputShape(1, 4, 2, 2048, 64), topic_tokens=64))
    assert not by_blocks(clustered(1200, 1200))


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL,
        MaskSpec(kv_lengths=torch.tensor([1200, 900])),
        MaskSpec(is_causal=True, window=(500, -1)),
    ],
    ids=["causal", "ragged", "window"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_by_leaves_are_within_the_bound(monkeypatch, mask, dtype):
    ran: list[int] = []
    run = LeafAttention.attend

    def counted(self, choices, pause, into):
        ran.append(len(choices))
        return run(self, choices, pause, into)

    monkeypatch.setattr(LeafAttention, "attend", counted)
    tensors = [x.to(dtype) for x in clustered(1200, 1200, batch=2)]
    exact = attend(*(x.float() for x in tensors), PlanKind.DENSE, mask)
    checked = attend_with_error_bound(*tensors, mask, ErrorBound(0.1, PlanKind.DENSE, block_size=32, max_density=0.9))
    assert ran
    assert checked.kind is PlanKind.SPARSE
    assert relative(checked.out, exact.out) <= checked.error.relative_l2_upper <= 0.1
    assert checked.density is not None
    assert 0 < checked.density < 1
    visible = 4 * sum(segment.visible_pairs // 4 for segment in split(*tensors, mask))
    assert checked.pairs_scored > checked.density * visible


def test_an_answer_too_far_off_is_tried_again_with_smaller_thresholds(monkeypatch):
    monkeypatch.setattr(segment_plan, "AIM", 3.0)
    tensors = clustered(1200, 1200)
    exact = attend(*tensors, PlanKind.DENSE, CAUSAL)
    bound = ErrorBound(0.08, PlanKind.DENSE, block_size=32, max_density=0.9)
    checked = attend_with_error_bound(*tensors, CAUSAL, bound)
    assert checked.reason.startswith("measured error ") or "exact: measured error" in checked.reason
    assert relative(checked.out, exact.out) <= max(checked.error.relative_l2_upper, 1e-6) <= 0.08


def test_queries_far_longer_than_the_others_keep_their_rows():
    query, key, value = clustered(1200, 1200)
    query[:, :, 300::300] *= 40
    exact = attend(query, key, value, PlanKind.DENSE, CAUSAL)
    output = prepared(AttentionInputs(query, key, value, CAUSAL)).attend([EVERYTHING] * 4, no_checkpoint)
    torch.testing.assert_close(output.out, exact.out, atol=1e-3, rtol=1e-3)


def test_any_strides_are_read():
    tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in clustered()]
    exact = attend(*tensors, PlanKind.DENSE, CAUSAL)
    output = prepared(AttentionInputs(*tensors, CAUSAL)).attend([EVERYTHING] * 4, no_checkpoint)
    torch.testing.assert_close(output.out, exact.out, atol=1e-4, rtol=1e-4)


def test_the_sequences_of_a_call_share_the_memory_of_leaves(monkeypatch):
    tensors = clustered(1200, 1200, batch=2)
    mask = MaskSpec(kv_lengths=torch.tensor([1200, 1199]))
    one = by_leaf.bytes_of(AttentionInputs(*(x[:1] for x in tensors), MaskSpec()))
    monkeypatch.setattr(by_leaf, "LEAF_BYTES", int(1.5 * one))
    planner = segment_plan.SegmentPlanner(None)
    plans = [
        planner.plan(part, AttentionInputs(*part.tensors, part.mask), SelectionSettings(32, 0.4), 0.035)
        for part in split(*tensors, mask)
    ]
    assert [plan.selection is None for plan in plans] == [True, False]


def test_one_key_head_is_enough_to_refuse():
    draw = torch.Generator().manual_seed(0)
    shapes = (1, 4, 700, 32), (1, 1, 700, 32), (1, 1, 700, 32)
    inputs = AttentionInputs(*(torch.randn(shape, generator=draw) for shape in shapes), CAUSAL)
    assert LeafAttention.of(inputs, tiles_of(inputs), 0.01, 0.5, no_checkpoint) is None


def test_work_can_be_cancelled_at_every_step():
    inputs = AttentionInputs(*clustered(), CAUSAL)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    leaves = LeafAttention.of(inputs, tiles_of(inputs), 0.05, None, count)
    assert leaves is not None
    made, calls = calls, 0
    leaves.attend([EVERYTHING] * 4, count)
    assert made > 11
    assert calls > 10 * 2
