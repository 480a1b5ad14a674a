"""What stands for a block is what its keys say, and single keys that say otherwise are found."""

import pytest
import torch

from service.attention.output import no_checkpoint
from service.attention.scores import LOG2_E, Scratch
from service.attention.sparse import moments
from service.attention.sparse.moments import BITS, moments_of
from service.attention.synthetic import InputShape, diffuse, structured


def of(key, value=None, bias=None, block_size=64):
    return moments_of(key, key if value is None else value, bias, block_size, no_checkpoint)


def gaussian(blocks, width=16, size=64, seed=0):
    """Keys with a mean and a covariance of their own in every block."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(blocks, width, width, generator=draw) / width**0.5
    keys = torch.randn(blocks, size, width, generator=draw) @ mix + torch.randn(blocks, 1, width, generator=draw)
    return keys.flatten(0, 1)


def test_first_and_second_moments():
    keys, values = gaussian(5), torch.randn(320, 8)
    found = of(keys, values)
    blocks = keys.view(5, 64, 16).double()
    torch.testing.assert_close(found.centroid, blocks.mean(1).float())
    torch.testing.assert_close(found.value, values.view(5, 64, 8).mean(1))
    torch.testing.assert_close(found.log_weight, torch.full((5,), 6.0))
    torch.testing.assert_close(found.radius, (blocks - blocks.mean(1, True)).norm(dim=2).amax(1).float())
    assert len(found.outliers) == 0
    channels = blocks.var(1, correction=0).float()
    torch.testing.assert_close((found.rest + found.axis.square()) / BITS, channels)
    largest = torch.linalg.eigvalsh((blocks - blocks.mean(1, True)).mT @ (blocks - blocks.mean(1, True)) / 64)[:, -1]
    assert (found.axis.square().sum(1) / BITS > 0.9 * largest.float()).all()


def test_masses_of_gaussian_keys():
    """Jensen below, the log-normal mean close by, and the mean of squares that the risk is made of."""
    draw = torch.Generator().manual_seed(1)
    along = torch.nn.functional.normalize(torch.randn(3, 1, 16, generator=draw), dim=2)
    keys = 0.4 * torch.randn(3, 4096, 16, generator=draw) * torch.rand(16, generator=draw)
    keys += 1.5 * torch.randn(3, 4096, 1, generator=draw) * along + torch.randn(3, 1, 16, generator=draw)
    q = torch.randn(20, 16, generator=draw)
    found = of(keys.flatten(0, 1), block_size=4096)
    least, first, second = found.masses(q, slice(0, 3), None, Scratch(q.device))
    scores = torch.einsum("md,bkd->mbk", q.double(), keys.double())
    mean = torch.exp2(scores).mean(2).log2()
    assert (least <= mean + 1e-4).all()
    assert ((least + first) - mean).abs().mean() < 0.05
    assert (least - mean).abs().mean() > 0.3
    squares = torch.exp2(2 * scores).mean(2).log2() / 2
    assert ((least + second) - squares).abs().mean() < 0.15


def test_two_clusters_are_not_taken_for_a_wide_gaussian():
    """Half of the keys 10 bits above the centre, half below: a log-normal would say 35 bits more than there is."""
    along = torch.eye(8)[0]
    keys = torch.cat((along.repeat(32, 1), -along.repeat(32, 1)))
    least, first, _ = of(keys).masses(10 * along[None], slice(0, 1), None, Scratch(keys.device))
    assert float(least + first) == pytest.approx(10.0, abs=0.1)


def test_softcap_shrinks_the_spread():
    keys, cap = gaussian(4, seed=3), 4.0
    q = 0.5 * torch.randn(30, 16, generator=torch.Generator().manual_seed(4)) * LOG2_E
    found = of(keys)
    capped = cap * LOG2_E * torch.tanh((q @ keys.T) / (cap * LOG2_E))
    mean = torch.exp2(capped).view(30, 4, 64).mean(2).log2()
    rough = sum(found.masses(q, slice(0, 4), None, Scratch(q.device))[:2])
    least, first, _ = found.masses(q, slice(0, 4), cap, Scratch(q.device))
    told = found.estimates(q, torch.arange(4), cap, Scratch(q.device))
    for estimate in (least + first, told):
        assert (estimate - mean).abs().mean() < 0.7 * (rough - mean).abs().mean()


def test_estimates_follow_the_overall_spread():
    keys = gaussian(6, seed=5)
    q = 0.5 * torch.randn(40, 16, generator=torch.Generator().manual_seed(6))
    mean = torch.exp2(q @ keys.T).view(40, 6, 64).mean(2).log2()
    found = of(keys)
    told = found.estimates(q, torch.arange(6), None, Scratch(q.device))
    assert (told - mean).abs().mean() < 0.5 * (q @ found.centroid.T - mean).abs().mean()


@pytest.mark.parametrize("topic_tokens", [40, 100, 256])
def test_planted_keys_are_the_outliers(topic_tokens):
    """Whatever the topics' borders are to the blocks'."""
    for seed in range(3):
        _, key, _ = structured(InputShape(1, 1, 1, 2048, 64), seed=seed, topic_tokens=topic_tokens, needles=0)
        key = key[0, 0]
        draw = torch.Generator().manual_seed(seed)
        places = torch.randperm(2040, generator=draw)[:5].sort().values + 8
        key[places] = 15.5 * torch.nn.functional.normalize(torch.randn(5, 64, generator=draw), dim=1)
        found = set(of(key, block_size=128).outliers.tolist())
        assert {0, 1, 2, 3} <= found  # the sinks
        assert set(places.tolist()) <= found
        assert len(found) < 60


def test_equal_and_random_keys_have_no_outliers():
    assert len(of(torch.randn(1, 16).repeat(256, 1)).outliers) == 0
    _, key, _ = diffuse(InputShape(1, 1, 1, 2048, 64))
    assert len(of(key[0, 0], block_size=128).outliers) == 0


def test_one_giant_key_is_an_outlier_and_leaves_no_trace():
    keys = gaussian(2, seed=7)
    clean = of(keys)
    keys[70] = 1e4
    found = of(keys)
    assert found.outliers.tolist() == [70]
    torch.testing.assert_close(found.centroid[0], clean.centroid[0])
    assert float(found.log_weight[1]) == pytest.approx(torch.tensor(63.0).log2())
    assert float((found.centroid[1] - clean.centroid[1]).abs().max()) < 0.5


def test_a_bias_weighs_the_keys():
    """A key with bias log 2 counts twice, one with -inf not at all."""
    keys, values = gaussian(1, size=32, seed=8), torch.randn(32, 4)
    bias = torch.zeros(32)
    bias[:4], bias[4:8] = torch.tensor(2.0).log(), -torch.inf
    found = of(keys, values, bias, block_size=32)
    twice = torch.cat((keys[:4], keys[:4], keys[8:]))
    torch.testing.assert_close(found.centroid[0], twice.mean(0))
    torch.testing.assert_close(found.value[0], torch.cat((values[:4], values[:4], values[8:])).mean(0))
    assert float(found.log_weight[0]) == pytest.approx(5.0)


def test_nothing_to_see_weighs_nothing():
    found = of(gaussian(2), bias=torch.cat((torch.zeros(64), torch.full((64,), -torch.inf))))
    assert found.log_weight.tolist() == [6.0, -torch.inf]
    assert torch.isfinite(found.centroid).all()
    assert torch.isfinite(found.axis).all()


def test_a_few_blocks_at_a_time_are_all_blocks(monkeypatch):
    keys = gaussian(7)[:-20]
    whole = of(keys)
    monkeypatch.setattr(moments, "MOMENTS_BYTES", 1)
    parts = of(keys)
    for name in ("centroid", "axis", "reach", "rest", "size", "radius", "log_weight", "value", "outliers"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert float(whole.log_weight[-1]) == pytest.approx(torch.tensor(44.0).log2())
