"""Attention as pure tensor functions: `attend(query, key, value, plan, mask) -> AttentionOutput(out, lse, ...)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.core.plan import Plan, PlanKind

if TYPE_CHECKING:  # masks and variants are imported when first used: `python -m service.attention.masks` stays clean
    import torch

    from service.attention.masks import MaskSpec
    from service.attention.output import AttentionOutput, Checkpoint
    from service.attention.segments import Segment
    from service.attention.sparse.selection import Selection

DEFAULT_BLOCK_SIZE = 128
DEFAULT_EPSILON = 0.4
ERROR_EXPONENT = 0.75  # measured on structured inputs: errors fall like epsilon to this power


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | PlanKind,
    mask: MaskSpec,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq].

    Inputs are validated and finite (`validate.check_attention`). `checkpoint` is called between blocks and may raise.
    """
    from service.attention.segments import join, split

    kind = plan if isinstance(plan, PlanKind) else plan.kind

    def run(segment: Segment) -> AttentionOutput:
        tensors = segment.query, segment.key, segment.value, segment.mask
        match kind:
            case PlanKind.DENSE:
                from service.attention import dense

                return dense.attend(*tensors, scale=scale, softcap=softcap, checkpoint=checkpoint)
            case PlanKind.CHUNKED:
                from service.attention import chunked

                return chunked.attend(*tensors, scale=scale, softcap=softcap, checkpoint=checkpoint)
            case PlanKind.SPARSE:
                from service.attention.sparse import attend as sparse

                chosen = select_blocks(segment, plan, scale, softcap, checkpoint)
                return sparse.attend(*tensors, chosen, scale=scale, softcap=softcap, checkpoint=checkpoint)

    return join(query, value, split(query, key, value, mask), run)


def select_blocks(
    segment: Segment, plan: Plan | PlanKind, scale: float | None, softcap: float | None, checkpoint: Checkpoint | None
) -> Selection:
    """The key blocks that a sparse plan reads; `plan.selection` names the method, by default "moments"."""
    block_size, epsilon, method = DEFAULT_BLOCK_SIZE, DEFAULT_EPSILON, "moments"
    if not isinstance(plan, PlanKind):
        block_size, method = plan.block_size, plan.selection or method
        epsilon = DEFAULT_EPSILON if plan.epsilon is None else plan.epsilon
    match method:
        case "moments":
            from service.attention.sparse.selection import select

            tensors = segment.query, segment.key, segment.value
            return select(*tensors, segment.mask, block_size, epsilon, scale, softcap, checkpoint)
        case "antidiagonal":
            from benchmarks import antidiagonal

            settings = block_size, 1.0 - epsilon, scale, softcap, checkpoint
            return antidiagonal.select(segment.query, segment.key, segment.mask, *settings)
    raise ValueError(f"selection: expected moments or antidiagonal, got {method!r}")
