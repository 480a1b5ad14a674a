"""Checks how a loaded model reads texts, against the tokenizer that Transformers makes of the same directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.core.options import ClassifyOptions, EmbedOptions, ForwardOptions, ModelTask, ScoreOptions
from service.core.request import ForwardRequest
from service.errors import FarsightError
from service.models.inputs.rows import EncodedInput
from service.models.loading.probe import probe_texts
from service.models.model import Model

OPTIONS: dict[ModelTask, ForwardOptions] = {
    "embed": EmbedOptions(truncate="end"),
    "classify": ClassifyOptions(truncate="end"),
    "rerank": ClassifyOptions(truncate="end"),
    "score": ScoreOptions(truncate="end"),
}


def verified_texts(model: Model, tokenizer: Any) -> list[EncodedInput]:
    """The rows of a few dozen texts, or of pairs of them if the model ranks, as this model reads them.

    Texts of which nothing is left and ids beyond the model's vocabulary are left out: requests with them are refused.

    Args:
        model: its inputs are checked, no pass runs.
        tokenizer: of Transformers.

    Raises RuntimeError if ids or token types differ from `tokenizer`'s own.
    """
    texts = probe_texts(tokenizer)
    default = model.inputs.spec.default_prompt
    before = "" if default is None else model.inputs.spec.prompts[default].text
    pairs = list(zip(texts, texts[::-1], strict=True)) if model.info.task == "rerank" else None
    rows = []
    for index, text in enumerate(texts):
        pair = None if pairs is None else pairs[index]
        row = _row(model, text, pair)
        if row is not None:
            # as a batch: a call for one pair drops an empty second text
            given = ([before + text],) if pair is None else ([pair[0]], [pair[1]])
            expected = {name: values[0] for name, values in tokenizer(*given).items()}
            _compare(model, row, expected, text if pair is None else " | ".join(pair))
            rows.append(row)
    return rows


def _row(model: Model, text: str, pair: tuple[str, str] | None) -> EncodedInput | None:
    """None if a request with this text would be refused."""
    request = ForwardRequest("probe", model.info.name, model.info.task, OPTIONS[model.info.task], texts=(text,))
    if pair is not None:
        request = replace(request, texts=(), pairs=(pair,))
    elif model.inputs.spec.has_target:
        request = replace(request, texts=(), pairs=((text, "a"),))
    try:
        return model.tokenize(request).rows[0]
    except FarsightError:
        return None


def _compare(model: Model, row: EncodedInput, expected: Mapping[str, Sequence[int]], text: str) -> None:
    shown = f"model {model.info.name!r}: the text {text[:40]!r}"
    ids = expected["input_ids"]
    if len(ids) > model.info.max_length:  # cut, and cuts are our own
        return
    if row.ids != tuple(ids):
        raise RuntimeError(f"{shown} has the tokens {list(row.ids)[:12]}, but {list(ids)[:12]} by its tokenizer")
    types = tuple(expected.get("token_type_ids", ())) if model.inputs.spec.has_types else ()
    if types and (row.types or (0,) * len(types)) != types:
        raise RuntimeError(f"{shown} has other token types than by its tokenizer")
