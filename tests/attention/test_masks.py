"""Every mask is an interval per row; a brute-force predicate says which."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.attention.dispatch import attend
from service.attention.masks import EXAMPLES, MaskSpec, draw, main, mask_of, row_bounds
from service.core.options import AttentionOptions
from service.core.plan import PlanKind


def may_see(mask: MaskSpec, b: int, i: int, j: int, query_length: int, key_length: int) -> bool:
    """The definition, one pair at a time."""
    if mask.cu_seqlens_q is not None:
        cu_q, cu_k = mask.cu_seqlens_q, mask.cu_seqlens_k
        s = next(s for s in range(len(cu_q) - 1) if cu_q[s] <= i < cu_q[s + 1])
        if not cu_k[s] <= j < cu_k[s + 1]:
            return False
        i, j, query_length, length = i - cu_q[s], j - cu_k[s], cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
    else:
        length = key_length if mask.kv_lengths is None else int(mask.kv_lengths[b])
    offset = {"bottom_right": length - query_length, "top_left": 0}.get(mask.causal_alignment, mask.causal_alignment)
    p = i + offset
    left, right = mask.window or (-1, -1)
    return (
        j < length and (not mask.is_causal or j <= p) and (left < 0 or j >= p - left) and (right < 0 or j <= p + right)
    )


@st.composite
def masks(draw):
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    edge = st.integers(-1, 9)
    options = {
        "is_causal": draw(st.booleans()),
        "causal_alignment": draw(st.sampled_from(["bottom_right", "top_left"]) | st.integers(-9, 9)),
        "window": draw(st.none() | st.tuples(edge, edge)),
    }
    match draw(st.sampled_from(["plain", "ragged", "packed"])):
        case "ragged":
            lengths = draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
            options["kv_lengths"] = torch.tensor(lengths)
        case "packed":
            batch, count = 1, draw(st.integers(0, 3))
            for name, length in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
                cuts = draw(st.lists(st.integers(0, length), min_size=count, max_size=count))
                options[name] = (0, *sorted(cuts), length)
    return MaskSpec(**options), batch, queries, keys


@settings(max_examples=100, deadline=None, derandomize=True)
@given(masks())
def test_bounds_are_the_predicate(drawn):
    mask, batch, queries, keys = drawn
    lo, hi = row_bounds(mask, batch, queries, keys)
    assert lo.shape == hi.shape == (batch, queries)
    for b in range(batch):
        for i in range(queries):
            expected = [j for j in range(keys) if may_see(mask, b, i, j, queries, keys)]
            assert list(range(int(lo[b, i]), int(hi[b, i]))) == expected
    assert torch.equal(row_bounds(mask, batch, queries, keys, queries // 2)[1], hi[:, queries // 2 :])


def test_drawing():
    assert draw(MaskSpec(is_causal=True, window=(1, -1)), 3, 4) == "##..\n.##.\n..##"
    main(["window"])
    with pytest.raises(SystemExit, match="expected one of full"):
        main(["diagonal"])


def test_the_module_runs_without_warnings():
    command = [sys.executable, "-W", "error", "-m", "service.attention.masks", "packed"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("packed\n#...")
    assert set(EXAMPLES) >= {"window", "packed"}


def test_the_package_imports_no_framework_above_it():
    code = (
        "import service.attention.sparse.bounded_error, sys; "
        "assert not {'ray', 'transformers', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_become_a_mask():
    options = AttentionOptions(is_causal=True, causal_alignment=3, window=(5, -1), kv_lengths=(4, 0))
    mask = mask_of(options)
    assert (mask.is_causal, mask.causal_alignment, mask.window) == (True, 3, (5, -1))
    assert mask.kv_lengths is not None
    assert mask.kv_lengths.tolist() == [4, 0]
    assert mask_of(AttentionOptions()) == MaskSpec()


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seqlens_q": (0, 3)},
        {"cu_seqlens_q": (0, 3), "cu_seqlens_k": (0, 3), "kv_lengths": torch.tensor([3])},
        {"causal_alignment": "left"},
    ],
)
def test_contradictions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"cu_seqlens|kv_lengths|causal_alignment"):
        MaskSpec(**wrong)


@pytest.mark.parametrize("kind", list(PlanKind))
def test_the_smallest_float_is_a_mask_that_stays_a_number(kind):
    """Callers write finfo.min for "hidden": against other keys it hides, in a row of its own it hides nothing."""
    bias = torch.zeros(4, 6)
    bias[0, 2:], bias[1] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    bias[2, 3], bias[3, 1:] = torch.finfo(torch.float32).max, -torch.inf
    q, k, v = (torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(length)) for length in (4, 6, 6))
    out = attend(q, k, v, kind, mask_of(AttentionOptions(), bias)).out[0, 0]
    alone = attend(q, k[:, :, :2], v[:, :, :2], kind, MaskSpec()).out[0, 0]
    torch.testing.assert_close(out[0], alone[0])
    torch.testing.assert_close(out[1], v[0, 0].mean(0))
    torch.testing.assert_close(out[2], v[0, 0, 3])
    torch.testing.assert_close(out[3], v[0, 0, 0])
