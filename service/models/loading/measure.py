"""Measures a loaded model by passes: the matrices it multiplies, who attends to whom in it, and its shortest pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.core.model_info import LayerKind, MatrixSizes
from service.models.hook import ForwardContext
from service.models.inputs.rows import EncodedInput
from service.models.loading.probe import probe_context, probe_rows
from service.models.model import Model

WARM_REPEATS = 12  # of the probe's first row: about 200 tokens
WARM_S = 0.25  # a device is warm after a pass of this length

_Pass = Callable[[list[EncodedInput], ForwardContext], None]


@torch.inference_mode()
def counted(model: Model) -> Model:
    """`model` with the sizes of its matrices and the kinds of its attention layers, as passes show them.

    That works for every architecture, and makes closed forms of what any pass costs.
    """

    def states(rows: list[EncodedInput], context: ForwardContext) -> None:
        list(model.hidden_states(rows, context))

    def task(rows: list[EncodedInput], context: ForwardContext) -> None:
        match model.info.task:
            case "classify" | "rerank":
                model.classify(rows, context)
            case "score":
                for part in model.scored_states(rows, context):
                    model.logits(part.states)
            case "embed":
                model.embed(rows, context)

    rows = probe_rows(model)
    state = next(model.hidden_states(rows[:1], probe_context())).states
    is_embedder = model.info.task == "embed"
    info = replace(
        model.info,
        # as they come out: projections and the steps after pooling may make them narrower or wider
        dimensions=model.embed(rows[:1], probe_context()).shape[1] if is_embedder else state.shape[1],
        state_dimensions=state.shape[1],
        weights=_matrix_sizes(model, rows, states),
        task_weights=_matrix_sizes(model, rows, task),
        attention=_layer_kinds(rows[:1], states),
        task_attention=_layer_kinds(rows[:1], task),
    )
    return replace(model, info=info)


def warmed(model: Model) -> Model:
    """`model` with the time of its shortest pass: four tokens, the fastest of five passes.

    Then runs ever larger passes, as requests will: what libraries prepare at the first pass of a size (kernels, memory)
    must not be part of the first caller's time.
    """
    row = _repeated(probe_rows(model)[0], 1, 4)
    smallest_s = min(_pass_s(model, [row]) for _ in range(5))
    row = _repeated(probe_rows(model)[0], WARM_REPEATS, model.info.max_length)
    count = 1
    while count * len(row) <= model.max_batch_tokens and _pass_s(model, [row] * count) < WARM_S:
        count *= 2
    return replace(model, info=replace(model.info, smallest_pass_s=smallest_s))


def _repeated(row: EncodedInput, times: int, most: int) -> EncodedInput:
    """`row` so many times in a row, at most `most` tokens."""
    types = None if row.types is None else (row.types * times)[:most]
    return replace(row, ids=(row.ids * times)[:most], types=types)


def _matrix_sizes(model: Model, rows: list[EncodedInput], run: _Pass) -> MatrixSizes:
    """Numbers in the matrices that `run` multiplies, by what they are multiplied with.

    A matrix shows that by the number of rows it is given: tokens, sequences, or one in each pass.
    """
    rows = rows if model.info.packed else rows[:1]
    calls: list[tuple[int, int]] = []  # rows and numbers of each matrix

    def record(module: Any, _: Any, output: torch.Tensor) -> None:
        width = module.out_channels if isinstance(module, nn.Conv1d | nn.Conv2d) else output.shape[-1]
        calls.append((output.numel() // width, module.weight.numel()))

    layers = [*model.module.modules(), *(part for step in model.pooling.steps for part in step.modules())]
    matrices = [layer for layer in layers if isinstance(layer, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d)]
    handles = [matrix.register_forward_hook(record) for matrix in matrices]
    run(rows, probe_context())
    for handle in handles:
        handle.remove()
    if model.info.inputs in ("image", "audio"):  # all images, and all windows of audio, have one size
        return MatrixSizes(0, sequence=sum(count * numbers for count, numbers in calls))
    source, target = sum(len(row.ids) for row in rows), sum(len(row.target or ()) for row in rows)
    names = {1: "once", len(rows): "sequence", target: "target", source: "source"}
    sizes = dict.fromkeys(("source", "target", "sequence", "once"), 0)
    for count, numbers in calls:
        sizes[names.get(count, "once")] += numbers if count in names else count * numbers
    return MatrixSizes(**sizes)


def _layer_kinds(rows: list[EncodedInput], run: _Pass) -> tuple[LayerKind, ...]:
    """The attention layers of a pass over one row, equal ones counted together."""
    context = probe_context()
    run(rows, context)
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


@torch.inference_mode()
def _pass_s(model: Model, rows: list[EncodedInput]) -> float:
    start = time.perf_counter()
    for part in model.hidden_states(rows, probe_context()):
        part.states[-1].cpu()  # waits for the device
    return time.perf_counter() - start
