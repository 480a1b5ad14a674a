"""Request bodies, limited while they stream in: no upload holds more bytes, or holds them longer, than allowed."""

from __future__ import annotations

import asyncio

import numpy as np
from starlette.requests import ClientDisconnect, Request

from service.api.codec import Body
from service.api.handler import INLINE_BYTES
from service.api.service import InferenceService
from service.errors import FarsightError, Kind, malformed, too_large
from service.scheduling.inflight_bytes import HeldBytes

MAX_DIGITS = 19  # of a content-length


async def read_body(service: InferenceService, request: Request, held: HeldBytes, tenant: str) -> Body:
    """The whole body; its bytes count in `held` as they arrive.

    Raises FarsightError: 413 over the limit, 415 if it is encoded, 429 if the queue or the memory is full, 504 if it
    takes too long, 499 if the caller leaves.
    """
    limit_s = service.config.default_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await _read(service, request, held, tenant)
    except TimeoutError:
        message = f"request body not received within {limit_s:g} s"
        raise FarsightError(Kind.DEADLINE, message, code="slow_upload") from None
    except ClientDisconnect:
        raise FarsightError(Kind.CANCELLED, "the client disconnected while sending the body") from None


async def _read(service: InferenceService, request: Request, held: HeldBytes, tenant: str) -> Body:
    limit = service.config.max_request_bytes
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise FarsightError(Kind.UNSUPPORTED_MEDIA, f"content-encoding: expected identity, got {encoding[:32]!r}")
    text = request.headers.get("content-length", "")
    is_sized = text.isdecimal() and len(text) <= MAX_DIGITS and "transfer-encoding" not in request.headers
    declared = int(text) if is_sized else None
    if declared is not None and declared > limit:
        raise too_large("request body", declared, limit, "bytes")
    if declared is None or declared > INLINE_BYTES:
        service.check_open(tenant)  # before it is sent in vain
    size, body = 0, bytearray()
    # of a known size: memory that is not touched before its bytes come, so that nothing grows and moves
    whole = None if declared is None else np.empty(declared, np.uint8).data
    async for chunk in request.stream():
        if size + len(chunk) > limit:
            raise too_large("request body", size + len(chunk), limit, "bytes")
        held.take(len(chunk))  # as they arrive: a sender who only promises bytes takes no room
        size += len(chunk)
        if len(chunk) == declared:
            return chunk
        if whole is None:
            body += chunk
        elif size <= whole.nbytes:
            whole[size - len(chunk) : size] = chunk
    if declared is not None and size != declared:  # what was not written to is uninitialised memory
        raise malformed(f"content-length: expected {declared} bytes, got {size}")
    return body if whole is None else whole
