"""Parameters of the Open Inference Protocol into options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from service.core.options import (
    AttentionOptions,
    ClassifyOptions,
    EmbedOptions,
    ForwardOptions,
    HiddenOptions,
    Priority,
    ScoreOptions,
    Task,
)
from service.errors import FarsightError, invalid

TASK_OPTIONS: dict[Task, type[ForwardOptions]] = {
    "embed": EmbedOptions,
    "classify": ClassifyOptions,
    "rerank": ClassifyOptions,
    "score": ScoreOptions,
    "hidden": HiddenOptions,
}


_LIST_OPTIONS = frozenset(
    {"window", "kv_lengths", "returns", "rows", "positions"}
)  # JSON text where parameters have no lists


_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


Options = TypeVar("Options", AttentionOptions, ForwardOptions)


def parse_options(model: type[Options], parameters: Mapping[str, Any], timeout_s: float | None) -> Options:
    """Validated options of one model, with the parameters that Triton's clients know translated or ignored."""
    given = {name: value for name, value in parameters.items() if value is not None}
    given.pop("binary_data_output", None)  # HTTP has read it; gRPC is always raw
    for name in _SEQUENCE:
        if given.pop(name, 0) not in (0, "", "0", False):
            raise invalid(f"{name}: sequences are not served", param=name)
    timeout_us = given.pop("timeout", 0)
    if not isinstance(timeout_us, int) or timeout_us < 0:
        raise invalid("timeout: expected microseconds, an integer of 0 or more", param="timeout")
    if "priority" in given and isinstance(given["priority"], int):
        given["priority"] = _priority(given["priority"])
    for name in given.keys() & _LIST_OPTIONS:
        given[name] = _list(name, given[name])
    unknown = sorted(given.keys() - model.model_fields.keys())
    if unknown:
        known = ", ".join(model.model_fields)
        raise invalid(f"parameter {unknown[0][:96]!r} is unknown; there are: {known}", param=unknown[0][:96])
    try:
        options = model.model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error
    limits = [options.timeout_s, timeout_us / 1e6 or None, timeout_s]
    shortest = min((limit for limit in limits if limit is not None), default=None)
    return options.model_copy(update={"timeout_s": shortest})


def _priority(level: int) -> Priority:
    """Triton counts from 1, the most urgent; 0 is the default."""
    if isinstance(level, bool) or level < 0:
        raise invalid("priority: expected 'interactive', 'batch', or an integer of 0 or more", param="priority")
    return Priority.INTERACTIVE if level <= 1 else Priority.BATCH


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{name}: expected a list, as JSON text where parameters are strings", param=name) from error


def refusal(error: ValidationError) -> FarsightError:
    """The first thing that pydantic found, without the value that it found."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return invalid(f"{where}: {first['msg']}", param=str(first["loc"][0]) if first["loc"] else None)
