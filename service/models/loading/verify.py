"""Checks a loaded model against Transformers' own eager attention, and decides whether it may run packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from service.models import hook
from service.models.inputs.rows import EncodedInput
from service.models.loading.probe import probe_context, probe_rows
from service.models.model import Model, states_by_row

# relative L2 distance to eager attention that rounding explains, by dtype
MAX_DISTANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def verified(model: Model) -> Model:
    """`model`, packed if its packed passes equal eager attention, else unpacked.

    Raises RuntimeError if unpacked passes differ from eager attention, too, or cannot run.
    """
    rows = probe_rows(model)
    expected = _eager_outputs(model, rows)
    failures = []
    for packed in (True, False) if model.info.packed else (False,):
        candidate = replace(model, info=replace(model.info, packed=packed))
        if not packed:
            candidate = replace(candidate, classifier=None)
        try:
            outputs = _outputs(candidate, rows)
        except NotImplementedError as error:
            failures.append(str(error))
            continue
        worst = max(_distance(ours, eager) for ours, eager in zip(outputs, expected, strict=True))
        if worst <= MAX_DISTANCE[model.info.dtype]:
            return candidate
        failures.append(f"{'packed' if packed else 'unpacked'} pass differs from eager attention by {worst:.2g}")
    raise RuntimeError(f"model {model.info.name!r} ({model.info.architecture}): {'; '.join(failures)}")


@torch.inference_mode()
def _eager_outputs(model: Model, rows: list[EncodedInput]) -> list[torch.Tensor]:
    """Each row alone, with eager attention: hidden states [L, H] of all rows, then logits of all rows if there is a
    head. Float32 on the CPU."""
    states, logits = [], []
    with _eager_attention(model.module):
        for row in rows:
            if model.info.task != "embed":
                logits.append(model.head_logits([row], probe_context()).flatten(0, -2))
            states.append(model.unpacked_states([row], probe_context())[0])
    return [output.float().cpu() for output in (*states, *logits)]


@torch.inference_mode()
def _outputs(model: Model, rows: list[EncodedInput]) -> list[torch.Tensor]:
    """The same outputs as `_eager_outputs`, with our attention and all rows together."""
    context = probe_context()
    states = dict(states_by_row(model.hidden_states(rows, context)))
    logits: dict[int, torch.Tensor] = {}
    if model.info.task == "score":
        scored = states_by_row(model.scored_states(rows, context))
        logits = {index: model.logits(found) for index, found in scored}
    elif model.info.task in ("classify", "rerank"):
        logits = dict(enumerate(model.classify(rows, context)[:, None]))
    outputs = [*(states[index] for index in sorted(states)), *(logits[index] for index in sorted(logits))]
    return [output.float().cpu() for output in outputs]


@contextmanager
def _eager_attention(module: Any) -> Iterator[None]:
    module.set_attn_implementation("eager")
    if module.config._attn_implementation != "eager":
        raise RuntimeError(f"{module.config.model_type} does not compute attention through the AttentionInterface")
    try:
        yield
    finally:
        module.set_attn_implementation(hook.NAME)


def _distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; infinite if either is not finite."""
    distance = float((output - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance if distance == distance else float("inf")
