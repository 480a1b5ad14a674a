"""Parameters of an infer request to options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from service.api.schema import first_error
from service.core.options import AttentionOptions, ForwardOptions, Priority
from service.errors import invalid

Options = TypeVar("Options", AttentionOptions, ForwardOptions)

# gRPC parameters and KServe's client have no lists: these may be JSON text
_LIST_OPTIONS = frozenset({"window", "kv_lengths", "returns", "rows", "positions"})
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


def parse_options(options: type[Options], parameters: Mapping[str, Any], timeout_s: float | None) -> Options:
    """Options from parameters; those that Triton's clients send (sequence, priority, timeout) are translated.

    The shortest of `timeout_s`, the option of that name and Triton's `timeout` (microseconds) counts. Raises INVALID,
    naming the first wrong parameter.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    given.pop("binary_data_output", None)  # read by http_body; gRPC answers are always raw
    for name in _SEQUENCE:
        if given.pop(name, 0) not in (0, "", "0", False):
            raise invalid(f"{name}: sequences are not supported", param=name)
    timeout_us = given.pop("timeout", 0)
    if not isinstance(timeout_us, int) or timeout_us < 0:
        raise invalid("timeout: expected microseconds, an integer of 0 or more", param="timeout")
    if "priority" in given and isinstance(given["priority"], int):
        given["priority"] = _priority(given["priority"])
    for name in given.keys() & _LIST_OPTIONS:
        given[name] = _list(name, given[name])
    parsed = _validated(options, given)
    limits = [parsed.timeout_s, timeout_us / 1e6 or None, timeout_s]
    shortest = min((limit for limit in limits if limit is not None), default=None)
    return parsed.model_copy(update={"timeout_s": shortest})


def check_no_parameters(name: str, parameters: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Raises INVALID if the tensor `name` has any parameter but those `ignored`."""
    for unknown in parameters:
        if unknown not in ignored:
            raise invalid(f"{name[:96]}: unknown parameter {unknown[:96]!r}", param=name[:96])


def _validated(options: type[Options], given: dict[str, Any]) -> Options:
    unknown = sorted(given.keys() - options.model_fields.keys())
    if unknown:
        known = ", ".join(options.model_fields)
        raise invalid(f"unknown parameter {unknown[0][:96]!r}; expected one of {known}", param=unknown[0][:96])
    try:
        return options.model_validate(given)
    except ValidationError as error:
        field, message = first_error(error, options)
        raise invalid(message, param=field.partition(".")[0]) from error


def _priority(level: int) -> Priority:
    """Triton's levels start at 1, the most urgent; 0 is the default."""
    if isinstance(level, bool) or level < 0:
        raise invalid("priority: expected 'interactive', 'batch', or an integer of 0 or more", param="priority")
    return Priority.INTERACTIVE if level <= 1 else Priority.BATCH


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{name}: expected a list, or a list as JSON text", param=name) from error
