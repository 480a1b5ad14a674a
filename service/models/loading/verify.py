"""A loaded model against Transformers' own eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from service.models import hook
from service.models.inputs.rows import EncodedInput
from service.models.loading.measure import counted
from service.models.loading.probe import CHECK_PLAN, probe_inputs
from service.models.model import Model, by_row

# relative L2 distance to eager attention that rounding explains, by dtype
CHECK_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def verified(model: Model) -> Model:
    """Equal to eager attention, packed where that is right; raises RuntimeError where nothing is."""
    rows = probe_inputs(model)
    expected = _expected(model, rows)
    failures = []
    for packed in (True, False) if model.info.packed else (False,):
        candidate = replace(model, info=replace(model.info, packed=packed))
        if not packed:
            candidate = replace(candidate, classifier=None)
        context = hook.ForwardContext(CHECK_PLAN)
        try:
            got = _got(candidate, rows, context)
        except NotImplementedError as error:
            failures.append(str(error))
            continue
        worst = max(_distance(a, b) for a, b in zip(got, expected, strict=True))
        if worst <= CHECK_ERROR[model.info.dtype]:
            return replace(candidate, info=counted(candidate, rows))
        failures.append(f"{'packed' if packed else 'single'} pass differs from eager attention by {worst:.2g}")
    raise RuntimeError(f"model {model.info.name!r} ({model.info.architecture}): {'; '.join(failures)}")


@torch.inference_mode()
def _expected(model: Model, rows: list[EncodedInput]) -> list[torch.Tensor]:
    """Of each row alone, with Transformers' eager attention: hidden states, and what the model's head makes of them."""
    states, heads_ = [], []
    with _eager(model.module):
        for row in rows:
            arguments = model._batch([row])
            if model.info.task != "embed":
                heads_.append(model._pass(model.module, hook.ForwardContext(CHECK_PLAN), None, **arguments).logits)
            arguments.pop("decoder_input_ids", None)
            output = model._pass(model.base, hook.ForwardContext(CHECK_PLAN), None, **arguments)
            states.append(output.last_hidden_state[0])
    return [one.float().cpu() for one in (*states, *(head.flatten(0, -2) for head in heads_))]


@torch.inference_mode()
def _got(model: Model, rows: list[EncodedInput], context: hook.ForwardContext) -> list[torch.Tensor]:
    """The same by our passes: all rows together."""
    states: dict[int, torch.Tensor] = {}
    logits: dict[int, torch.Tensor] = {}
    for at, found in by_row(model.states(rows, context)):
        states[at] = found.float().cpu()
    if model.info.task == "score":
        for at, found in by_row(model.scored_states(rows, context)):
            logits[at] = model.logits(found).cpu()
    elif model.info.task in ("classify", "rerank"):
        logits = dict(enumerate(one[None] for one in model.classify(rows, context)))
    return [*(states[at] for at in sorted(states)), *(logits[at] for at in sorted(logits))]


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    module.set_attn_implementation("eager")
    if module.config._attn_implementation != "eager":
        raise RuntimeError(f"{module.config.model_type} does not compute attention through the AttentionInterface")
    try:
        yield
    finally:
        module.set_attn_implementation(hook.NAME)


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2; infinite where either is not finite."""
    distance = float((got - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance if distance == distance else float("inf")
