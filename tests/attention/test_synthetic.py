"""Workloads are what they say: the same for a seed, typed, shaped, and findable."""

import pytest
import torch

from service.attention.masks import MaskSpec
from service.attention.synthetic import (
    InputShape,
    diffuse,
    plant_needle,
    planted,
    structured,
)
from service.attention.weights import WeightsView, top_weights


@pytest.mark.parametrize("make", [structured, diffuse])
def test_shapes_types_and_seeds(make):
    q, k, v = make(InputShape(2, 4, 2, 300, 16), torch.bfloat16, seed=1)
    assert q.shape == (2, 4, 300, 16)
    assert k.shape == v.shape == (2, 2, 300, 16)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in (q, k, v))
    assert torch.equal(q, make(InputShape(2, 4, 2, 300, 16), torch.bfloat16, seed=1)[0])
    assert not torch.equal(q, make(InputShape(2, 4, 2, 300, 16), torch.bfloat16, seed=2)[0])


def test_needles_are_found_by_their_rows():
    q, k, v = structured(InputShape(1, 2, 1, 600, 32), needles=0)
    plant_needle(q, k, v, 123, (400, 500))
    values, indices = top_weights(q, k, MaskSpec(is_causal=True), WeightsView((400, 500, 450)), top_k=1)
    assert (indices[:, :, :2, 0] == 123).all()
    assert (values[:, :, :2, 0] > 0.99).all()
    assert (indices[:, :, 2, 0] != 123).all()


def test_the_planted_needles_are_where_they_are_said_to_be():
    (q, k, v), needles = planted(InputShape(1, 2, 1, 600, 32), seed=5, needles=3)
    assert all(
        torch.equal(x, y)
        for x, y in zip((q, k, v), structured(InputShape(1, 2, 1, 600, 32), seed=5, needles=3), strict=True)
    )
    assert len({needle.at for needle in needles}) == 3
    later: set[int] = set()
    for needle in reversed(needles):
        rows = tuple(row for row in needle.rows if row not in later)
        later |= set(needle.rows)
        values, indices = top_weights(q, k, MaskSpec(is_causal=True), WeightsView(rows), top_k=1)
        assert len(rows) > 8
        assert (indices[..., 0] == needle.at).all()
        assert (values[..., 0] > 0.99).all()
    assert planted(InputShape(1, 2, 1, 600, 32), seed=5, needles=0)[1] == ()
