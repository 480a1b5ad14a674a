"""HTTP responses: JSON, bodies in parts, errors by the one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.codec import dump_json, error_document
from service.errors import CODES, FarsightError, Kind, retry_after
from service.scheduling.inflight_bytes import HeldBytes

JSON = "application/json"
BLOCK_BYTES = 1024 * 1024  # of an answer that is sent


class PartsResponse(Response):
    """A response whose headers are all ours: encoded once, without Starlette's check of each of them.

    A body in parts is sent block by block, as fast as the caller reads: only one block of it is in memory twice.
    """

    def __init__(
        self, body: bytes | Sequence[memoryview], headers: Mapping[str, str], media_type: str, status: int = 200
    ) -> None:
        self.parts = [memoryview(body)] if isinstance(body, bytes) else body
        self.status_code, self.background = status, None
        self.size = sum(part.nbytes for part in self.parts)
        self.held: HeldBytes | None = None  # until it is sent
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw += [(b"content-type", media_type.encode()), (b"content-length", str(self.size).encode())]
        self.raw_headers = raw

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.held is None:
            await self._send(send)
            return
        with self.held:
            await self._send(send)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        left = self.size
        for part in self.parts:
            for start in range(0, part.nbytes, BLOCK_BYTES):
                # bytes: Serve's own proxy, which stands in while replicas change, pickles them
                block = bytes(part[start : start + BLOCK_BYTES])
                left -= len(block)
                await send({"type": "http.response.body", "body": block, "more_body": left > 0})
        if not self.size:
            await send({"type": "http.response.body", "body": b""})


def json_response(document: dict[str, Any] | list[Any], headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(document), 200, headers, JSON)


def error_response(error: FarsightError, *, v2: bool = False) -> Response:
    """The one answer of a request that failed; `v2`: in the form of the Open Inference Protocol."""
    if error.kind is Kind.CANCELLED:
        return Response(status_code=CODES[error.kind].http)  # to a closed connection
    after_s = error.retry_after_s
    headers = {} if after_s is None else {"retry-after": retry_after(after_s)}
    if error.kind is Kind.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    body = {"error": error.message} if v2 else error_document(error)
    return Response(dump_json(body), CODES[error.kind].http, headers, JSON)


# what any route may answer: it reads a body within its limits, whatever the method
READING = (
    Kind.MALFORMED, Kind.TOO_LARGE, Kind.UNSUPPORTED_MEDIA, Kind.OVERLOADED, Kind.DEADLINE, Kind.INTERNAL,
)  # fmt: skip


def error_responses(*kinds: Kind, v2: bool = False) -> dict[int | str, dict[str, object]]:
    """The OpenAPI text of a route's errors, those of reading its body included."""
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{'ErrorText' if v2 else 'Error'}"}}}
    meanings: dict[int, list[str]] = {}
    for kind in dict.fromkeys((*READING, *kinds)):
        meanings.setdefault(CODES[kind].http, []).append(CODES[kind].meaning)
    return {status: {"description": " ".join(said), "content": content} for status, said in sorted(meanings.items())}


WORK_KINDS = tuple(kind for kind in Kind if kind not in (Kind.METHOD_NOT_ALLOWED, Kind.CANCELLED))
WORK_ERRORS = error_responses(*WORK_KINDS)  # any route that takes work may answer these
TEXT: dict[str, object] = {"type": "string"}
ERROR_FIELDS: dict[str, object] = {
    "message": TEXT,
    "type": {"type": "string", "enum": [kind.value for kind in Kind]},
    "code": TEXT,
    "param": {"type": ["string", "null"], "description": "The field that is wrong."},
    "retry_after_s": {
        "type": "number",
        "description": "Where waiting helps; the Retry-After header has whole seconds.",
    },
}


def _error_schema(error: dict[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}


ERROR_SCHEMAS = {
    "Error": _error_schema(
        {
            "type": "object",
            "properties": ERROR_FIELDS,
            "required": [name for name in ERROR_FIELDS if name != "retry_after_s"],
            "additionalProperties": False,
        }
    ),
    "ErrorText": _error_schema(TEXT),
}
