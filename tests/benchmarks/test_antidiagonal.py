"""XAttention's selection reads what it must, drops what it may, and finds what is heavy."""

from __future__ import annotations

import pytest
import torch

from benchmarks import antidiagonal
from service.attention import dense, reference
from service.attention.masks import MaskSpec, row_bounds
from service.attention.sparse import attend as sparse
from service.attention.synthetic import InputShape, diffuse, structured
from tests.attention.helpers import assert_within_budget

BLOCK = 32
MASKS = {
    "causal": MaskSpec(is_causal=True),
    "bidirectional": MaskSpec(),
    "window": MaskSpec(is_causal=True, window=(70, -1)),
    "top_left": MaskSpec(is_causal=True, causal_alignment="top_left"),
}
LENGTHS = [(256, 256), (250, 250), (100, 333), (333, 100), (7, 200), (40, 5)]


def visible_blocks(mask: MaskSpec, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(seen by any row, seen whole by every row) [nQ, nK], key by key."""
    lo, hi = row_bounds(mask, 1, rows, keys)
    at = torch.arange(keys)
    pairs = (at >= lo[0, :, None]) & (at < hi[0, :, None])
    blocks = [part.split(BLOCK, 1) for part in pairs.split(min(BLOCK, rows), 0)]
    any_row = torch.tensor([[bool(block.any()) for block in row] for row in blocks])
    whole = torch.tensor([[bool(block.all()) and block.shape[1] == BLOCK for block in row] for row in blocks])
    return any_row, whole


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
def test_partial_blocks_are_read_and_invisible_ones_are_not(name: str, rows: int, keys: int) -> None:
    q = diffuse(InputShape(2, 4, 2, rows, 16), seed=1)[0]
    _, k, _ = diffuse(InputShape(2, 4, 2, keys, 16), seed=2)
    chosen = antidiagonal.select(q, k, MASKS[name], BLOCK, 0.5)
    seen, whole = visible_blocks(MASKS[name], rows, keys)
    assert chosen.keep.shape == (2, 4, *seen.shape)
    assert (chosen.keep | ~(seen & ~whole)).all()
    assert not (chosen.keep & ~seen).any()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
def test_threshold_one_is_exact(name: str, rows: int, keys: int) -> None:
    q = diffuse(InputShape(1, 4, 2, rows, 16), seed=3)[0] * 4
    _, k, v = diffuse(InputShape(1, 4, 2, keys, 16), seed=4)
    chosen = antidiagonal.select(q, k, MASKS[name], BLOCK, 1.0)
    assert torch.equal(chosen.keep[0, 0], visible_blocks(MASKS[name], rows, keys)[0])
    assert chosen.pairs == chosen.visible
    assert_within_budget(sparse.attend(q, k, v, MASKS[name], chosen), q, k, v, MASKS[name])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_heavy_block_is_found_by_the_heads_that_look_for_it(is_causal: bool) -> None:
    q, k, v = diffuse(InputShape(1, 4, 2, 512, 16), seed=5)
    q *= 0.1
    heavy = torch.zeros(16)
    heavy[0] = 8.0
    k[:, 1, 160:192] += heavy  # block 5 of the second key head,
    q[:, 3, 320:352] += heavy  # looked for by block 10 of the last query head
    chosen = antidiagonal.select(q, k, MaskSpec(is_causal=is_causal), BLOCK, 0.6)
    always = {0, 10} if is_causal else set()
    assert set(chosen.keep[0, 3, 10].nonzero().flatten().tolist()) == {5} | always
    assert chosen.keep[0, 2, 10].sum() > 4 + len(always)  # the same keys, another head: diffuse
    near = sparse.attend(q, k, v, MaskSpec(is_causal=is_causal), chosen).out[0, 3, 320:352]
    exact = dense.attend(q, k, v, MaskSpec(is_causal=is_causal)).out[0, 3, 320:352]
    assert (near - exact).norm() < 0.02 * exact.norm()


def test_weights_are_those_of_the_antidiagonals() -> None:
    """Where all scores of a tile's antidiagonal are the tile's mean, the estimate is exact."""
    q, k, _ = diffuse(InputShape(1, 1, 1, 128, 16), seed=6)
    q, k = (x[:, :, ::16].repeat_interleave(16, 2) for x in (q, k))
    weights = (q[0, 0] @ k[0, 0].T / 4).softmax(1).view(4, BLOCK, 4, BLOCK).sum((1, 3))
    for threshold in (0.3, 0.5, 0.8):
        chosen = antidiagonal.select(q, k, MaskSpec(), BLOCK, threshold)
        for row, kept in zip(weights / BLOCK, chosen.keep[0, 0], strict=True):
            smallest = next(n for n in range(1, 5) if row.topk(n).values.sum() >= threshold)
            assert set(kept.nonzero().flatten().tolist()) == set(row.topk(smallest).indices.tolist())


def test_more_threshold_more_pairs_and_less_error() -> None:
    q, k, v = structured(
        InputShape(1, 2, 2, 1024, 32), seed=7, topic_tokens=64, needles=0
    )  # means of sixteen scores miss them
    mask = MaskSpec(is_causal=True)
    exact = reference.attend(q, k, v, mask).out
    found = []
    for threshold in (0.2, 0.9, 0.999):
        chosen = antidiagonal.select(q, k, mask, BLOCK, threshold)
        output = sparse.attend(q, k, v, mask, chosen)
        assert output.density == chosen.density < 1
        found.append((chosen.density, -float((output.out - exact).norm())))
    assert found == sorted(found)
    assert found[0][0] < found[-1][0]
    assert -found[-1][1] < 0.05 * float(exact.norm())


def test_what_cannot_be_estimated_is_refused() -> None:
    q, k, _ = diffuse(InputShape(1, 1, 1, 64, 16))
    with pytest.raises(ValueError, match="attn_mask"):
        antidiagonal.select(q, k, MaskSpec(attn_mask=torch.zeros(64, 64)), BLOCK, 0.5)
    with pytest.raises(ValueError, match="stride: expected a divisor of block_size 32, got 24"):
        antidiagonal.select(q, k, MaskSpec(), BLOCK, 0.5, stride=24)


def test_it_is_antidiagonals_that_are_summed() -> None:
    one_hot = 16.0 * torch.eye(16).repeat(2, 1)  # 32 rows; row i of a stride scores with key i: a diagonal
    q = one_hot[None, None]
    k = torch.cat((one_hot, one_hot.flip(0)))[None, None]  # and with key 15 - i of the second block
    assert antidiagonal.select(q, k, MaskSpec(), BLOCK, 0.9).keep.flatten().tolist() == [False, True]


def test_keys_that_rows_cannot_see_do_not_matter() -> None:
    q, k, _ = diffuse(InputShape(1, 2, 2, 256, 16), seed=8)
    mask = MaskSpec(is_causal=True, window=(100, -1))
    before = antidiagonal.select(q, k, mask, BLOCK, 0.9).keep[:, :, 4]  # rows 128 to 159 see keys 28 to 159
    assert before[0, 0].sum() > 3  # more than the blocks seen in part
    for hidden in (slice(0, 16), slice(160, 256)):
        k[:, :, hidden] = 50 * q[:, :, 128:160].mean(2, keepdim=True)
    assert torch.equal(antidiagonal.select(q, k, mask, BLOCK, 0.9).keep[:, :, 4], before)


def test_the_rows_that_fill_up_the_last_block_weigh_nothing() -> None:
    q, k = torch.zeros(1, 1, 48, 16), torch.zeros(1, 1, 128, 16)
    k[..., 32:64, 0] = k[..., 96:128, 1] = 10.0
    q[..., 32:47, 0] = 10.0  # fifteen rows look for block 1,
    q[..., 47, 1] = 100.0  # the last for block 3; repeated, it would outweigh them
    assert antidiagonal.select(q, k, MaskSpec(), BLOCK, 0.8).keep[0, 0, 1].tolist() == [False, True, False, False]
