"""The inputs and the plan that a model is proven and measured with at load."""

from __future__ import annotations

import torch

from service.core.plan import Cost, Plan, PlanKind
from service.models.inputs.rows import EncodedInput
from service.models.model import Model

CHECK_PLAN = Plan(PlanKind.DENSE, Cost(0, 0, 0, 0), 0.0, "start-up check")


CHECK_LENGTHS = (17, 5)  # tokens of the two sequences of the check


def probe_inputs(model: Model) -> list[EncodedInput]:
    draw = torch.Generator().manual_seed(0)
    if model.inputs.images is not None:
        height, width = model.inputs.images.size
        pixels = torch.randn(2, model.inputs.images.channels, height, width, generator=draw)
        return [EncodedInput(pixels=one, patches=model.inputs.patches) for one in pixels]
    lengths = [min(length, model.info.max_length) for length in CHECK_LENGTHS]
    # not the special tokens at the start of most vocabularies: some models look for them
    low = min(10, model.info.vocab_size - 1)
    ids = [tuple(torch.randint(low, model.info.vocab_size, (n,), generator=draw).tolist()) for n in lengths]
    hf = model.module.config
    if hf.is_encoder_decoder and hf.eos_token_id is not None:  # classifiers look for it
        ids = [(*one[:-1], hf.eos_token_id) for one in ids]
    target = ids[1] if model.inputs.has_target else None
    return [EncodedInput(one, target=target) for one in ids]
