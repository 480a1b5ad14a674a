"""Who takes part in `benchmarks attention`: torch's kernels, our exact ones, sparse attention and its yardstick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import antidiagonal
from service.attention import DEFAULT_BLOCK_SIZE, DEFAULT_EPSILON
from service.attention.dispatch import attend
from service.attention.masks import MaskSpec
from service.attention.output import no_checkpoint
from service.attention.sparse import attend as sparse
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.attention.sparse.selection import SelectionSettings, select
from service.attention.synthetic import InputShape, Needle, diffuse, planted
from service.core.answer import ErrorReport
from service.core.plan import PlanKind

BISECTIONS = 8  # of the antidiagonal threshold
DECADES = 6.0  # thresholds from 0 to 1 - 10^-6


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "bfloat16"
    is_causal: bool = True
    max_error: float = 0.02
    epsilon: float = DEFAULT_EPSILON
    rounds: int = 3
    input: Literal["structured", "diffuse"] = "structured"
    seed: int = 0
    device: str = "cpu"
    dense_limit: int = 32768  # tokens; dense, chunked and flex are left out above
    antidiagonal_limit: int = 32768  # tokens; 0: never
    flex: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """query [1, Hq, L, D], key and value [1, Hkv, L, D] on the device."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskSpec
    needles: tuple[Needle, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    @property
    def grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]


@dataclass(frozen=True, slots=True)
class Ran:
    """One output, what produced it and what it says about itself."""

    out: torch.Tensor
    kind: str
    density: float | None = None
    epsilon: float | None = None
    threshold: float | None = None
    told: ErrorReport | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Absent:
    """A contender that does not run, and why."""

    reason: str


Run = Callable[[], Ran]


def inputs_of(settings: Settings, length: int) -> Inputs:
    shape = InputShape(1, settings.heads, settings.kv_heads, length, settings.head_dim)
    dtype = getattr(torch, settings.dtype)
    needles: tuple[Needle, ...] = ()
    if settings.input == "structured":
        tensors, needles = planted(shape, dtype, settings.seed)
    else:
        tensors = diffuse(shape, dtype, settings.seed)
    query, key, value = (x.to(settings.device) for x in tensors)
    return Inputs(query, key, value, MaskSpec(is_causal=settings.is_causal), needles)


def names(settings: Settings) -> list[str]:
    """In the order in which they run; the first is the one that all are compared with."""
    everybody = ["sdpa", "dense", "chunked", "sparse"]
    return everybody + ["antidiagonal"] * (settings.antidiagonal_limit > 0) + ["flex"] * settings.flex


def contenders(settings: Settings, inputs: Inputs) -> Mapping[str, Run | Absent]:
    """Ready to be timed: thresholds are found and kernels compiled here."""
    length = inputs.query.shape[2]
    limits = dict.fromkeys(("dense", "chunked", "flex"), settings.dense_limit)
    limits["antidiagonal"] = settings.antidiagonal_limit
    found: dict[str, Run | Absent] = {}
    for name in names(settings):
        limit = limits.get(name, length)
        over = length > limit
        found[name] = (
            Absent(f"{length} tokens are over its limit of {limit}") if over else _ready(name, settings, inputs)
        )
    return found


def _ready(name: str, settings: Settings, inputs: Inputs) -> Run | Absent:
    match name:
        case "sdpa":
            return lambda: Ran(sdpa(inputs), "sdpa")
        case "dense" | "chunked":
            kind = PlanKind(name)
            return lambda: Ran(attend(*inputs.tensors, kind, inputs.mask, checkpoint=no_checkpoint).out, kind)
        case "sparse":
            return lambda: _sparse(settings, inputs)
        case "antidiagonal":
            return _antidiagonal(settings, inputs)
        case "flex":
            return _flex(inputs)
    raise ValueError(f"contender: {name!r}")


def sdpa(inputs: Inputs) -> torch.Tensor:
    return scaled_dot_product_attention(*inputs.tensors, is_causal=inputs.mask.is_causal, enable_gqa=inputs.grouped)


def _sparse(settings: Settings, inputs: Inputs) -> Ran:
    """Selection, the sparse kernel and the audit; over max_error the exact answer too, as a caller would pay it."""
    bound = ErrorBound(settings.max_error, PlanKind.DENSE, settings.epsilon, seed=settings.seed, max_density=None)
    found = attend_with_error_bound(*inputs.tensors, inputs.mask, bound)
    return Ran(found.out, found.kind, found.density, found.epsilon, None, found.error, found.reason)


def _antidiagonal(settings: Settings, inputs: Inputs) -> Run:
    """At about our density, or the one that ours would have had. No audit: it makes no promise."""
    density = _sparse(settings, inputs).density
    if density is None:
        density = select(*inputs.tensors, inputs.mask, SelectionSettings(epsilon=settings.epsilon)).density
    threshold = matching_threshold(inputs, density)

    def run() -> Ran:
        chosen = antidiagonal.select(inputs.query, inputs.key, inputs.mask, DEFAULT_BLOCK_SIZE, threshold)
        out = sparse.attend(*inputs.tensors, inputs.mask, chosen).out
        return Ran(out, "antidiagonal", chosen.density, threshold=threshold)

    return run


def matching_threshold(inputs: Inputs, density: float) -> float:
    """Of those tried, the one whose density is nearest. Bisected in decades: most thresholds of use are close to 1."""
    low, high, tried = 0.0, DECADES, []
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        threshold = 1 - 10**-middle
        found = antidiagonal.select(inputs.query, inputs.key, inputs.mask, DEFAULT_BLOCK_SIZE, threshold).density
        tried.append((abs(found - density), threshold))
        low, high = (middle, high) if found < density else (low, middle)
    return min(tried)[1]


def _flex(inputs: Inputs) -> Run | Absent:
    """Compiled before it is timed; whatever the compiler raises on this machine is reported."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, device = inputs.query.shape[2], inputs.query.device
        block_mask = None
        if inputs.mask.is_causal:  # compiled too: otherwise it fills n x n numbers
            block_mask = torch.compile(create_block_mask)(_is_past, None, None, length, length, device=str(device))
        compiled = torch.compile(flex_attention)

        def run() -> Ran:
            out = compiled(*inputs.tensors, block_mask=block_mask, enable_gqa=inputs.grouped)
            return Ran(out, "flex")

        run()
    except Exception as error:  # noqa: BLE001 (compilers raise anything; the reason is printed and stored)
        return Absent(f"did not compile: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return run


def _is_past(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return column <= row
