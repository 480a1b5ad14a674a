"""The attention suite on a CUDA device: the same budget against the same reference. Run with `pytest -m gpu`."""

import pytest
import torch

from service.attention import cuda, reference
from service.attention.dispatch import attend
from service.attention.masks import MaskSpec
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.attention.sparse.selection import SelectionSettings
from service.attention.synthetic import InputShape, diffuse, structured
from service.core.plan import PlanKind

from ..attention.helpers import attend as attend_with
from ..attention.helpers import clustered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]
MASKS = {
    "full": MaskSpec(),
    "causal": MaskSpec(is_causal=True),
    "window": MaskSpec(is_causal=True, window=(100, -1)),
    "lengths": MaskSpec(kv_lengths=torch.tensor([384, 200])),
    "bias": MaskSpec(attn_mask=torch.randn(384, 384, generator=torch.Generator().manual_seed(0))),
    "packed": MaskSpec(is_causal=True, cu_seqlens_q=(0, 100, 384), cu_seqlens_k=(0, 100, 384)),
}


def on_gpu(mask: MaskSpec) -> MaskSpec:
    from dataclasses import replace

    moved = {
        name: getattr(mask, name).cuda() for name in ("kv_lengths", "attn_mask") if getattr(mask, name) is not None
    }
    return replace(mask, **moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", list(PlanKind))
@pytest.mark.parametrize("width", [64, 80, 256])
def test_every_plan_keeps_the_error_budget(kind, name, dtype, width):
    batch = 1 if name == "packed" else 2
    q, k, v = diffuse(InputShape(batch, 8, 2, 384, width), dtype)
    exact = reference.attend(q.double(), k.double(), v.double(), MASKS[name])
    naive = reference.attend(q, k, v, MASKS[name])
    settings = SelectionSettings(64, 1e-7)
    output = attend_with(q.cuda(), k.cuda(), v.cuda(), kind, on_gpu(MASKS[name]), settings=settings)
    allowed = 2 * float((naive.out.double() - exact.out).abs().max()) + 2 * torch.finfo(dtype).eps * float(
        exact.out.abs().max()
    )
    assert float((output.out.cpu().double() - exact.out).abs().max()) <= allowed
    assert torch.equal(output.lse.cpu() == -torch.inf, exact.lse == -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_least_one_fused_kernel_is_sound(dtype):
    assert cuda.sound(torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("mask", [MaskSpec(is_causal=True), MaskSpec()], ids=["causal", "full"])
def test_sparse_answers_are_measured(mask):
    tensors = [x.cuda() for x in structured(InputShape(1, 8, 2, 8192, 64), torch.bfloat16)]
    checked = attend_with_error_bound(*tensors, mask, ErrorBound(0.02, PlanKind.DENSE, 0.4, 128, max_density=None))
    exact = attend(*tensors, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    error = float((checked.out.float() - exact.out.float()).norm() / exact.out.float().norm())
    assert error <= checked.error.relative_l2_upper <= 0.02


def test_leaves_are_read_on_the_gpu_as_on_the_cpu():
    tensors = clustered(8192, 8192, dim=64)
    bound = ErrorBound(0.1, PlanKind.DENSE, max_density=None)
    mask = MaskSpec(is_causal=True)
    checked = attend_with_error_bound(*(x.cuda() for x in tensors), mask, bound)
    exact = attend(*tensors, PlanKind.DENSE, mask)
    assert checked.kind is PlanKind.SPARSE
    error = float((checked.out.cpu() - exact.out).norm() / exact.out.norm())
    assert error <= checked.error.relative_l2_upper <= 0.1
    assert checked.density == pytest.approx(attend_with_error_bound(*tensors, mask, bound).density, abs=0.05)
