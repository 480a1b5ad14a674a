"""Long passes in slices: a checkpoint before each of a model's own operations, and large ones by rows.

Attention stops by itself between its blocks; without this the layers around it would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from service.attention.output import Checkpoint, slice_flops

POINTWISE = frozenset(
    {
        functional.gelu,
        functional.silu,
        functional.relu,
        torch.tanh,
        torch.Tensor.pow,
        torch.pow,
    }
)
# of one slice; a few passes over new memory at the ~2 GB/s of pages that are touched for the first time
SLICE_ELEMENTS = 8_000_000


class Sliced(TorchFunctionMode):
    """While it is entered, operations of this thread call `checkpoint` before they run."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        self._checkpoint()
        if function is functional.linear:
            return self._linear(*args, **given)
        if function is torch.addmm and len(args) == 3 and not given:  # GPT-2's linear layers
            return self._product(args[1], args[2], args[0])
        if function in POINTWISE and args[0].numel() > SLICE_ELEMENTS:
            return self._by_rows(function, args, given)
        return function(*args, **given)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flat = input.reshape(-1, input.shape[-1])
        return self._product(flat, weight.t(), bias).reshape(*input.shape[:-1], len(weight))

    def _product(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """rows [n, in] @ weight [in, out] + bias."""
        most = max(1, int(slice_flops(rows.device) / (2 * weight.numel())))
        if len(rows) <= most:
            return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        out = rows.new_empty(len(rows), weight.shape[1])
        for start in range(0, len(rows), most):
            part, into = rows[start : start + most], out[start : start + most]
            if bias is None:
                torch.mm(part, weight, out=into)
            else:
                torch.addmm(bias, part, weight, out=into)
            self._checkpoint()
        return out

    def _by_rows(self, function: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Any]) -> torch.Tensor:
        """Of operations that treat every number alike."""
        whole = args[0]
        flat = whole.reshape(-1, whole.shape[-1])
        step = max(1, SLICE_ELEMENTS // flat.shape[1])
        parts = []
        for start in range(0, len(flat), step):
            parts.append(function(flat[start : start + step], *args[1:], **given))
            self._checkpoint()
        return torch.cat(parts).reshape(whole.shape)
