"""What a model multiplies and who sees whom in it, as passes show; and its warm-up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.core.model_info import LayerKind, MatrixSizes, ModelInfo
from service.models import hook
from service.models.inputs.rows import EncodedInput
from service.models.loading.probe import CHECK_PLAN, probe_inputs
from service.models.model import Model

WARM_REPEATS, WARM_S = 12, 0.25  # of the check's sequence: about 200 tokens; passes longer than this are warm enough


Passes = Callable[[hook.ForwardContext, list[EncodedInput]], None]


@torch.inference_mode()
def counted(model: Model, rows: list[EncodedInput]) -> ModelInfo:
    """What a pass multiplies, and who sees whom, layer by layer, as passes show: closed forms for any architecture."""

    def states(context: hook.ForwardContext, rows: list[EncodedInput]) -> None:
        list(model.states(rows, context))

    def task(context: hook.ForwardContext, rows: list[EncodedInput]) -> None:
        match model.info.task:
            case "classify" | "rerank":
                model.classify(rows, context)
            case "score":
                for _, found, _ in model.scored_states(rows, context):
                    model.logits(found)
            case _:
                states(context, rows)

    return replace(
        model.info,
        weights=_weights(model, rows, states),
        task_weights=_weights(model, rows, task),
        attention=_layers(rows[:1], states),
        task_attention=_layers(rows[:1], task),
    )


def _weights(model: Model, rows: list[EncodedInput], work: Passes) -> MatrixSizes:
    """A matrix is known by the rows that it is given: as many as there are tokens, sequences, or one in each pass."""
    rows = rows if model.info.packed else rows[:1]
    calls: list[tuple[int, int]] = []  # rows and numbers of each matrix

    def note(module: Any, _: Any, output: torch.Tensor) -> None:
        width = module.out_channels if isinstance(module, nn.Conv2d) else output.shape[-1]
        calls.append((output.numel() // width, module.weight.numel()))

    matrices = [one for one in model.module.modules() if isinstance(one, nn.Linear | Conv1D | nn.Conv2d)]
    handles = [one.register_forward_hook(note) for one in matrices]
    work(hook.ForwardContext(CHECK_PLAN), rows)
    for handle in handles:
        handle.remove()
    if model.info.inputs == "image":  # all of one size
        return MatrixSizes(0, sequence=sum(count * weights for count, weights in calls))
    source, target = sum(len(row.ids) for row in rows), sum(len(row.target or ()) for row in rows)
    names = {1: "once", len(rows): "sequence", target: "target", source: "source"}
    found = dict.fromkeys(("source", "target", "sequence", "once"), 0)
    for count, weights in calls:
        found[names.get(count, "once")] += weights if count in names else count * weights
    return MatrixSizes(**found)


def _layers(rows: list[EncodedInput], work: Passes) -> tuple[LayerKind, ...]:
    context = hook.ForwardContext(CHECK_PLAN)
    work(context, rows)
    target = len(rows[0].target or ())
    return tuple(
        LayerKind(
            count,
            pattern.is_causal,
            pattern.window,
            queries="target" if queries == target else "source",
            keys="target" if keys == target else "source",
        )
        for (pattern, queries, keys), count in Counter(context.patterns).items()
    )


def warmed(model: Model) -> Model:
    """With the fastest of a few passes of four tokens: what every pass costs, however short.

    Then ever larger passes, as requests will make them: what libraries prepare at the first pass of a size (kernels,
    memory) is not the first caller's time.
    """
    row = probe_inputs(model)[0]
    short = replace(row, ids=row.ids[:4])
    smallest_s = min(_pass_s(model, [short]) for _ in range(5))
    row = replace(row, ids=(row.ids * WARM_REPEATS)[: model.info.max_length])
    count = 1
    while count * len(row) <= model.max_batch_tokens and _pass_s(model, [row] * count) < WARM_S:
        count *= 2
    return replace(model, info=replace(model.info, smallest_pass_s=smallest_s))


@torch.inference_mode()
def _pass_s(model: Model, rows: list[EncodedInput]) -> float:
    start = time.perf_counter()
    for _, states, _ in model.states(rows, hook.ForwardContext(CHECK_PLAN)):
        states[-1].cpu()  # waits for the device
    return time.perf_counter() - start
