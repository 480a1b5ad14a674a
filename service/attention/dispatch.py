"""One function for all kinds of attention: it chooses the variant and runs it on every sequence of a batch."""

from __future__ import annotations

import torch

from service.attention import chunked, dense
from service.attention.masks import MaskSpec
from service.attention.output import DEFAULT_SCORING, AttentionOutput, Checkpoint, Scoring
from service.attention.segments import Segment, join, split
from service.attention.sparse import attend as sparse
from service.attention.sparse.selection import SelectionSettings, select
from service.core.plan import PlanKind


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kind: PlanKind,
    mask: MaskSpec,
    *,
    scoring: Scoring = DEFAULT_SCORING,
    checkpoint: Checkpoint | None = None,
) -> AttentionOutput:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq].

    Args:
        query, key, value: validated and finite (`validate.check_attention`).
        kind: the variant; SPARSE selects with the default settings and measures no error.
        mask: causality, window, lengths, packing and attn_mask.
        scoring: scale and softcap.
        checkpoint: called between blocks of work; may raise to stop it.

    Returns:
        The output; density, pairs and risky rows if the kind is sparse.

    Raises:
        ValueError: cu_seqlens of the mask do not cover the rows and keys.
    """

    def run(segment: Segment) -> AttentionOutput:
        tensors = *segment.tensors, segment.mask
        match kind:
            case PlanKind.DENSE:
                return dense.attend(*tensors, scoring=scoring, checkpoint=checkpoint)
            case PlanKind.CHUNKED:
                return chunked.attend(*tensors, scoring=scoring, checkpoint=checkpoint)
            case PlanKind.SPARSE:
                selection = select(*tensors, SelectionSettings(), scoring=scoring, checkpoint=checkpoint)
                return sparse.attend(*tensors, selection, scoring=scoring, checkpoint=checkpoint)

    return join(query, value, split(query, key, value, mask), run)
