"""Fused kernels on CUDA, called by name so that MATH (n x n memory) is never taken, and only those found sound here.

Which kernels are right depends on driver, cuDNN and card (pytorch/pytorch#193893 lost 36 points of accuracy in
silence), so each is compared with the float64 reference once per process; the sound ones are tried fastest first.

Not run yet: no CUDA device was at hand when this was written. `tests/gpu` is its suite.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.functional import pad

from service.attention.merge import Partial

logger = logging.getLogger("farsight")

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, ...]]
HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = {"cudnn": 128, "flash": 256}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    bias: torch.Tensor | None,
    scale: float,
) -> Partial:
    """query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] -> out [B, Hq, Lq, D], lse [B, Hq, Lq]; causal: top-left."""
    width = query.shape[3]
    query, key, value = (pad(x, (0, -width % 8)) for x in (query, key, value))
    if bias is None and query.dtype in HALF and not (is_causal and query.shape[2] != key.shape[2]):
        for name in sound(query.device, query.dtype):
            if query.shape[3] <= MAX_HEAD_DIM[name]:
                return _shaped(KERNELS[name](query, key, value, is_causal, scale), query, width)
    return _shaped(_efficient(query, key, value, is_causal, bias, scale), query, width)


def _shaped(result: tuple[torch.Tensor, ...], query: torch.Tensor, width: int) -> Partial:
    """Kernels pad the log-sum-exp, or give it a last axis of one."""
    batch, heads, rows, _ = query.shape
    return result[0][..., :width], result[1].reshape(batch, heads, -1)[..., :rows]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return found


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    return found


KERNELS: dict[str, Kernel] = {"cudnn": _cudnn, "flash": _flash}


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Takes masks and float32, but no grouped heads; rows of a mask must start at multiples of 8 numbers."""
    batch, heads, rows, _ = query.shape
    columns, dtype = key.shape[2], query.dtype
    if bias is not None and dtype in HALF:  # half the digits of a bias of -100 are worth a tenth of a weight
        query, key, value = query.float(), key.float(), value.float()
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    if bias is not None:
        bias = pad(bias.to(query.dtype), (0, -columns % 8))[..., :columns].expand(batch, heads, rows, columns)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(query, key, value, bias, True, 0.0, is_causal, scale=scale)
    return out.to(dtype), lse


@lru_cache
def sound(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The self-test: kernels that err at most twice as much as naive attention of the same dtype, fastest first."""
    found = []
    for name, kernel in KERNELS.items():
        try:
            wrong = max(_excess(kernel, device, dtype, causal) for causal in (False, True))
        except RuntimeError as error:  # this card, or this build, has no such kernel
            logger.warning("attention kernel %s is left out: %s", name, str(error).splitlines()[0])
            continue
        if wrong <= 1:
            found.append((_seconds(kernel, device, dtype), name))
        else:
            logger.error("attention kernel %s is wrong on this device: %.1f times the error allowed", name, wrong)
    return tuple(name for _, name in sorted(found))


def _excess(kernel: Kernel, device: torch.device, dtype: torch.dtype, causal: bool) -> float:
    """Error of a kernel over the error allowed, grouped heads, output and log-sum-exp."""
    from service.attention import reference
    from service.attention.masks import MaskSpec

    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 384, 64, generator=draw).to(dtype) for heads in (8, 2, 2))
    mask = MaskSpec(is_causal=causal)
    exact = reference.attend(query.double(), key.double(), value.double(), mask)
    naive = reference.attend(query, key, value, mask)
    out, lse = _shaped(kernel(query.to(device), key.to(device), value.to(device), causal, 64**-0.5), query, 64)
    eps = torch.finfo(dtype).eps
    allowed = 2 * (float((naive.out.double() - exact.out).abs().max()) + eps * float(exact.out.abs().max()))
    wrong = float((out.cpu().double() - exact.out).abs().max()) / allowed
    return max(wrong, float((lse.cpu().double() - exact.lse).abs().max()) / 1e-2)


def _seconds(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    tensor = torch.randn(1, 16, 4096, 64, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        kernel(tensor, tensor, tensor, True, 64**-0.5)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
