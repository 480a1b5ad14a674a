"""Small inputs and a context that a model is verified and measured with at load."""

from __future__ import annotations

import torch

from service.core.plan import PlanKind
from service.models.hook import ForwardContext
from service.models.inputs.rows import EncodedInput
from service.models.model import Model

PROBE_LENGTHS = (17, 5)  # tokens of the two sequences


def probe_context() -> ForwardContext:
    """A context of exact attention. A new one for each pass: passes write into it."""
    return ForwardContext(PlanKind.DENSE)


def probe_rows(model: Model) -> list[EncodedInput]:
    """Two random inputs, always the same for one model: images, or token sequences of PROBE_LENGTHS."""
    draw = torch.Generator().manual_seed(0)
    spec = model.inputs.spec
    if spec.image_processor is not None:
        pixels = torch.randn(2, spec.image_processor.channels, *spec.image_processor.size, generator=draw)
        return [EncodedInput(pixels=image, patches=spec.patches) for image in pixels]
    lengths = [min(length, model.info.max_length) for length in PROBE_LENGTHS]
    # not the first ids, which most vocabularies use for special tokens: some models look for those
    low = min(10, model.info.vocab_size - 1)
    ids = [tuple(torch.randint(low, model.info.vocab_size, (n,), generator=draw).tolist()) for n in lengths]
    hf_config = model.module.config
    if hf_config.is_encoder_decoder and hf_config.eos_token_id is not None:  # classifiers need an end token
        ids = [(*row[:-1], hf_config.eos_token_id) for row in ids]
    target = ids[1] if spec.has_target else None
    return [EncodedInput(row, target=target) for row in ids]
