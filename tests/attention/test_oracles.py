"""Answers known in closed form, at lengths where the reference would be slow."""

from functools import partial

import pytest
import torch

from service.attention.masks import MaskSpec
from service.attention.sparse.selection import SelectionSettings
from service.attention.synthetic import InputShape, diffuse, plant_needle
from service.core.plan import PlanKind

from .helpers import attend as attend_with

attend = partial(attend_with, settings=SelectionSettings(block_size=128, epsilon=0.02))

KINDS = [PlanKind.DENSE, PlanKind.CHUNKED, PlanKind.SPARSE]
LENGTH = 3000


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_zero_queries_average_the_values(kind):
    _, k, v = diffuse(InputShape(1, 2, 2, LENGTH, 16))
    output = attend(torch.zeros_like(k), k, v, kind, MaskSpec())
    mean = v.mean(2, keepdim=True)
    # sparse may leave a negligible share of the mass out
    allowed = 1e-2 if kind is PlanKind.SPARSE else 1e-5
    torch.testing.assert_close(output.out, mean.expand_as(output.out), atol=allowed, rtol=0)
    torch.testing.assert_close(output.lse, torch.full_like(output.lse, LENGTH).log(), atol=0.021, rtol=0)


def test_ones_stay_ones(kind):
    q, k, v = diffuse(InputShape(1, 2, 1, LENGTH, 16))
    output = attend(q, k, torch.ones_like(v), kind, MaskSpec(is_causal=True, window=(700, -1)))
    torch.testing.assert_close(output.out, torch.ones_like(output.out))


LONG = 131_072


def test_ones_stay_ones_at_128k(kind):
    """The last 64 of 128K rows."""
    q, k, v = diffuse(InputShape(1, 1, 1, LONG, 8))
    output = attend(q[:, :, -64:], k, torch.ones_like(v), kind, MaskSpec(is_causal=True))
    rounding = torch.finfo(torch.float32).eps * LONG**0.5  # of a sum of so many terms
    torch.testing.assert_close(output.out, torch.ones_like(output.out), atol=rounding, rtol=0)


def test_zero_queries_average_the_values_at_128k(kind):
    _, k, v = diffuse(InputShape(1, 1, 1, LONG, 8))
    q = torch.zeros(1, 1, 64, 8)
    output = attend(q, k, v, kind, MaskSpec())
    allowed = 3e-3 if kind is PlanKind.SPARSE else 1e-5  # sparse leaves a negligible share out
    torch.testing.assert_close(output.out, v.mean(2, keepdim=True).expand_as(output.out), atol=allowed, rtol=0)
    torch.testing.assert_close(output.lse, torch.full_like(output.lse, LONG).log(), atol=0.05, rtol=0)


@pytest.mark.parametrize("at", [0, 65_535, 65_536, LONG - 100])
def test_a_needle_is_found_at_128k(kind, at):
    q, k, v = diffuse(InputShape(1, 1, 1, LONG, 16))
    plant_needle(q, k, v, at, (LONG - 40, LONG - 1))
    output = attend(q[:, :, -64:], k, v, kind, MaskSpec(is_causal=True))
    for row in (24, 63):
        torch.testing.assert_close(output.out[:, :, row], v[:, :, at], atol=1e-3, rtol=0)


@pytest.mark.parametrize("at", [0, 777, LENGTH - 1])
def test_a_needle_is_the_whole_answer(kind, at):
    q, k, v = diffuse(InputShape(1, 2, 2, LENGTH, 16))
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(at)), dim=0)
    q[:, :] = 20 * direction
    k[:, :, at] = 10 * direction
    output = attend(q, k, v, kind, MaskSpec())
    torch.testing.assert_close(output.out, v[:, :, at : at + 1].expand_as(output.out), atol=1e-4, rtol=0)
