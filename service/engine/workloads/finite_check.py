"""NaN and infinity never leave as an answer."""

from __future__ import annotations

import math

import torch

from service.errors import FarsightError, Kind


def is_finite(out: torch.Tensor) -> bool:
    """out, any shape."""
    if not out.numel() or not out.is_floating_point():
        return True
    return all(math.isfinite(bound) for bound in torch.aminmax(out))


def check_finite(out: torch.Tensor) -> None:
    """out, any shape. Raises FarsightError: finite inputs may still overflow on the way."""
    if not is_finite(out):
        raise FarsightError(
            Kind.INVALID,
            "the output is not finite: scores (query, key, scale, softcap) or values overflow their type",
            code="non_finite",
        )
