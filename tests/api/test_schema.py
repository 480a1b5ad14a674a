"""Bodies of the JSON routes: validated once, and their options taken from them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from service.api.schema import (
    ClassifyBody,
    EmbeddingsBody,
    ExplainBody,
    RerankBody,
    ScoreBody,
    options_of,
    validated,
)
from service.core.options import ClassifyOptions, EmbedOptions, ExplainOptions, ForwardOptions, Priority, ScoreOptions
from service.errors import FarsightError, Kind

GIVEN = {"truncate": "end", "priority": "batch", "timeout_s": 2, "max_error": 0.5}


@pytest.mark.parametrize(
    ("body", "inputs", "options", "own"),
    [
        (EmbeddingsBody, {"input": "a"}, EmbedOptions, {"dimensions": 2}),
        (ClassifyBody, {"input": "a"}, ClassifyOptions, {"raw_scores": True}),
        (RerankBody, {"query": "a", "documents": ["b"]}, ClassifyOptions, {}),
        (ScoreBody, {"input": "a"}, ScoreOptions, {"positions": [1, -1], "top_k": 3}),
        (ExplainBody, {"text": "a", "query": 0}, ExplainOptions, {"layers": [0]}),
    ],
)
def test_the_options_of_a_body_are_those_that_were_given(
    body: type[ForwardOptions], inputs: dict[str, object], options: type[ForwardOptions], own: dict[str, object]
) -> None:
    parsed = validated(body, {"model": "m", **inputs, **GIVEN, **own})
    found = options_of(parsed, options)
    assert type(found) is options
    assert found == options.model_validate({**GIVEN, **own})
    assert found.priority is Priority.BATCH
    assert options_of(validated(body, {"model": "m", **inputs}), options) == options()


@pytest.mark.parametrize(
    ("body", "values", "param", "says"),
    [
        (EmbeddingsBody, {"model": "m", "chunk_overlap": -1}, "chunk_overlap", "chunk_overlap: Input should be"),
        (ScoreBody, {"model": "m", "positions": [0, "secret"]}, "positions.1", "positions.1: Input should be"),
        (ScoreBody, {"model": "m", "positions": 3}, "positions", "positions: Input should be a list"),
        (EmbeddingsBody, [1], None, "body: Input should be"),
    ],
)
def test_the_first_wrong_field_is_named_without_its_value(
    body: type[BaseModel], values: object, param: str | None, says: str
) -> None:
    with pytest.raises(FarsightError) as caught:
        validated(body, values)
    assert (caught.value.kind, caught.value.param) == (Kind.INVALID, param)
    assert caught.value.message.startswith(says)
    assert "secret" not in caught.value.message
