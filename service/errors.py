"""Kinds of failure and their codes on each transport: one table, no transport imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

MAX_MESSAGE = 1000
MAX_PARAM = 100


class Kind(StrEnum):
    """Why a request was not answered."""

    MALFORMED = "malformed"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA = "unsupported_media"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    OVERLOADED = "overloaded"
    OVER_BUDGET = "over_budget"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of failure as callers see it: HTTP status, gRPC status name, whether a retry can help, its meaning."""

    http: int
    grpc: str
    retryable: bool
    meaning: str


CODES: dict[Kind, Code] = {
    Kind.MALFORMED: Code(400, "INVALID_ARGUMENT", False, "The body cannot be parsed."),
    Kind.INVALID: Code(422, "INVALID_ARGUMENT", False, "Wrong shape, type, value or combination; non-finite numbers."),
    # not RESOURCE_EXHAUSTED: that would invite a retry of what can never fit
    Kind.TOO_LARGE: Code(413, "INVALID_ARGUMENT", False, "Can never fit; the message names the size and the limit."),
    Kind.UNAUTHENTICATED: Code(401, "UNAUTHENTICATED", False, "No API key, or an unknown one."),
    Kind.FORBIDDEN: Code(403, "PERMISSION_DENIED", False, "The API key does not allow this operation."),
    Kind.NOT_FOUND: Code(404, "NOT_FOUND", False, "Unknown model or route."),
    Kind.METHOD_NOT_ALLOWED: Code(405, "UNIMPLEMENTED", False, "The route does not support this method."),
    Kind.UNSUPPORTED_MEDIA: Code(415, "INVALID_ARGUMENT", False, "Unsupported content type or content encoding."),
    Kind.OVERLOADED: Code(
        429, "RESOURCE_EXHAUSTED", True, "The queue is full; Retry-After is predicted from the queued work."
    ),
    Kind.OVER_BUDGET: Code(
        429, "RESOURCE_EXHAUSTED", True, "The tenant's budget is spent; Retry-After is the time until it refills."
    ),
    Kind.DEADLINE: Code(504, "DEADLINE_EXCEEDED", True, "Did not finish within timeout_s, or is predicted not to."),
    Kind.CANCELLED: Code(499, "CANCELLED", False, "The client disconnected (seen in metrics and logs only)."),
    Kind.UNAVAILABLE: Code(
        503, "UNAVAILABLE", True, "The service is starting, the device does not respond, or the ledger has no room."
    ),
    Kind.OUT_OF_MEMORY: Code(507, "RESOURCE_EXHAUSTED", True, "Out of device memory; the service has recovered."),
    Kind.INTERNAL: Code(500, "INTERNAL", False, "A bug; the response contains only the request id."),
}


class FarsightError(Exception):
    """The error that answers a request.

    `message` is shown to the caller: numbers and names, never inputs or internals. `param` names the wrong field.
    `retry_after_s` is computed; None: waiting does not help.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        message = message[:MAX_MESSAGE]  # it may contain names that callers chose; gRPC drops a status that is too long
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.code = code or kind.value
        self.param = None if param is None else param[:MAX_PARAM]
        self.retry_after_s = retry_after_s


def retry_after(seconds: float) -> str:
    """Whole seconds for a Retry-After header, rounded up: never earlier than the queue accepts the request."""
    return str(max(1, math.ceil(seconds)))


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> FarsightError:
    """422: the request can be parsed and is wrong."""
    return FarsightError(Kind.INVALID, message, param=param, code=code)


def malformed(message: str, *, param: str | None = None) -> FarsightError:
    """400: the request cannot be parsed."""
    return FarsightError(Kind.MALFORMED, message, param=param)


def internal_error(request_id: str) -> FarsightError:
    """500: a bug. The caller gets the id; the log has the rest."""
    return FarsightError(Kind.INTERNAL, f"internal error; request id {request_id}")


def too_large(
    what: str, size: int | float, limit: int | float, unit: str, *, param: str | None = None
) -> FarsightError:
    """413: `what` has `size` and can never be accepted over `limit`."""
    return FarsightError(Kind.TOO_LARGE, f"{what}: {size} {unit} is over the limit of {limit} {unit}", param=param)
