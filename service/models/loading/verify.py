"""Checks a loaded model against Transformers' own eager attention, and decides whether it may run packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from service.models import hook
from service.models.inputs.rows import EncodedInput
from service.models.loading.probe import probe_context, probe_rows
from service.models.loading.verify_texts import verified_texts
from service.models.model import Model, states_by_row
from service.models.tasks import embed

COPIES = 8  # of a row that is ill-conditioned
MAX_PASSED = 16  # texts whose passes are compared, too
# relative L2 distance to eager attention that rounding explains, by dtype
MAX_DISTANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def verified(model: Model, tokenizer: Any) -> Model:
    """`model`, packed if its packed passes equal eager attention, else unpacked.

    Args:
        model: as read from its files.
        tokenizer: that Transformers makes of the same files; None for images and audio.

    Raises RuntimeError if unpacked passes differ from eager attention, too, or cannot run, or texts are read in another
    way than by `tokenizer`.
    """
    rows = probe_rows(model)
    if tokenizer is not None:
        rows += _passed(verified_texts(model, tokenizer), tokenizer.pad_token_id)
    try:
        expected = _eager_outputs(model, rows)
    except (TypeError, AttributeError, IndexError) as error:  # it needs more, or other inputs
        kind = model.info.inputs if tokenizer is None else "text"
        reason = f"{model.info.architecture} does not run on {kind} alone: {error}"
        raise RuntimeError(f"model {model.info.name!r}: {reason}") from error
    if not all(bool(output.isfinite().all()) for output in expected):
        raise RuntimeError(f"model {model.info.name!r}: eager attention itself gives numbers that are not finite")
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
        distances = [_distance(ours, eager) for ours, eager in zip(outputs, expected, strict=True)]
        worst = max(distances)
        if not _unexplained(model, rows, expected, distances):
            return candidate
        failures.append(f"{'packed' if packed else 'unpacked'} pass differs from eager attention by {worst:.2g}")
    raise RuntimeError(f"model {model.info.name!r} ({model.info.architecture}): {'; '.join(failures)}")


@torch.inference_mode()
def _eager_outputs(model: Model, rows: list[EncodedInput]) -> list[torch.Tensor]:
    """Each row alone, with eager attention: hidden states [L, H] of all rows, then what the task makes of them:
    logits, or embeddings [1, D]. Float32 on the CPU."""
    states, results = [], []
    with _eager_attention(model.module):
        for row in rows:
            states.append(model.unpacked_states([row], probe_context())[0])
            if model.info.task != "embed":
                results.append(model.head_logits([row], probe_context()).flatten(0, -2))
                continue
            bounds = torch.tensor([0, len(row)], device=model.device)
            prompts = torch.tensor([row.prompt], device=model.device)
            results.append(embed.pool(states[-1], bounds, model.pooling, prompts=prompts))
    return [output.float().cpu() for output in (*states, *results)]


@torch.inference_mode()
def _outputs(model: Model, rows: list[EncodedInput]) -> list[torch.Tensor]:
    """The same outputs as `_eager_outputs`, with our attention and all rows together."""
    context = probe_context()
    states = dict(states_by_row(model.hidden_states(rows, context)))
    results: dict[int, torch.Tensor] = {}
    match model.info.task:
        case "score":
            scored = states_by_row(model.scored_states(rows, context))
            results = {index: model.logits(found) for index, found in scored}
        case "classify" | "rerank":
            results = dict(enumerate(model.classify(rows, context)[:, None]))
        case "embed":
            results = dict(enumerate(model.embed(rows, context)[:, None]))
    outputs = [*(states[index] for index in sorted(states)), *(results[index] for index in sorted(results))]
    return [output.float().cpu() for output in outputs]


def _passed(rows: Sequence[EncodedInput], padding_id: int | None) -> list[EncodedInput]:
    """Some of `rows`: evenly spread ones, and those with a padding token inside."""
    padded = [row for row in rows if padding_id in row.ids][:MAX_PASSED]
    return [*rows[:: max(1, len(rows) // MAX_PASSED)], *padded]


def _unexplained(
    model: Model, rows: Sequence[EncodedInput], expected: Sequence[torch.Tensor], distances: Sequence[float]
) -> bool:
    """Whether any of the `distances` is more than rounding explains.

    Some inputs are ill-conditioned: with huge activations, eager attention itself changes its states when the row runs
    beside copies of itself. Twice that change is allowed there.

    Args:
        model: to run such rows with.
        rows: R inputs.
        expected: 2R outputs of eager attention, the states of all rows first.
        distances: of the outputs that are checked, in the same order.
    """
    limit = MAX_DISTANCE[model.info.dtype]
    for index in {at % len(rows) for at, distance in enumerate(distances) if not distance <= limit}:
        with torch.inference_mode(), _eager_attention(model.module):
            beside = model.unpacked_states([rows[index]] * COPIES, probe_context())[0]
        noise = _distance(beside.float().cpu(), expected[index])
        allowed = max(limit, 2 * noise) if isfinite(noise) else limit
        if not max(distances[index], distances[index + len(rows)]) <= allowed:
            return True
    return False


@contextmanager
def _eager_attention(module: Any) -> Iterator[None]:
    module.set_attn_implementation("eager")
    if module.config._attn_implementation != "eager":
        raise RuntimeError(f"{module.config.model_type} {hook.OWN_ATTENTION}")
    try:
        yield
    finally:
        module.set_attn_implementation(hook.NAME)


def _distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; infinite if either is not finite."""
    distance = float((output - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance if distance == distance else float("inf")
