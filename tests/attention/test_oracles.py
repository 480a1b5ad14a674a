"""Answers known in closed form, at lengths where the reference would be slow."""

import pytest
import torch

from service.attention import attend
from service.attention.masks import MaskSpec
from service.attention.workloads import diffuse
from service.core import PlanKind

from .helpers import plan_of

KINDS = [PlanKind.DENSE, PlanKind.CHUNKED, PlanKind.SPARSE]
LENGTH = 3000


@pytest.fixture(params=KINDS)
def plan(request):
    return plan_of(request.param, block_size=128, epsilon=0.02)


def test_zero_queries_average_the_values(plan):
    _, k, v = diffuse(1, 2, 2, LENGTH, 16)
    output = attend(torch.zeros_like(k), k, v, plan, MaskSpec())
    mean = v.mean(2, keepdim=True)
    # 2 % of the mass may go: 60 of 3000 keys, 0.02 / sqrt(60) = 0.0026 standard deviation of a mean of unit Gaussians
    allowed = 1e-2 if plan.kind is PlanKind.SPARSE else 1e-5
    torch.testing.assert_close(output.out, mean.expand_as(output.out), atol=allowed, rtol=0)
    torch.testing.assert_close(output.lse, torch.full_like(output.lse, LENGTH).log(), atol=0.021, rtol=0)


def test_ones_stay_ones(plan):
    q, k, v = diffuse(1, 2, 1, LENGTH, 16)
    output = attend(q, k, torch.ones_like(v), plan, MaskSpec(is_causal=True, window=(700, -1)))
    torch.testing.assert_close(output.out, torch.ones_like(output.out))


@pytest.mark.parametrize("at", [0, 777, LENGTH - 1])
def test_a_needle_is_the_whole_answer(plan, at):
    q, k, v = diffuse(1, 2, 2, LENGTH, 16)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(at)), dim=0)
    q[:, :] = 20 * direction
    k[:, :, at] = 10 * direction
    output = attend(q, k, v, plan, MaskSpec())
    torch.testing.assert_close(output.out, v[:, :, at : at + 1].expand_as(output.out), atol=1e-4, rtol=0)
