"""HTTP plumbing shared by all routes: who calls, the body within its limits, every error as its one answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from service.api.answer import estimate_document
from service.api.codec import Body, parse_json
from service.api.handler import Call, Handler, request_id
from service.api.http.body import read_body
from service.api.http.multipart import MULTIPART, parse_form
from service.api.http.responses import BLOCK_BYTES, ERROR_SCHEMAS, JSON, PartsResponse, error_response, json_response
from service.api.service import InferenceService
from service.billing.tenants import DEFAULT_TENANT, key_of
from service.config import TenantConfig
from service.engine.pricing import Estimate
from service.errors import FarsightError, Kind, too_large
from service.telemetry.request_record import Received, RequestRecord

PROBES = ("v2",)  # called every few seconds, and they use nothing: not followed


@dataclass(frozen=True, slots=True)
class HttpCall(Call):
    """One HTTP request as its endpoint sees it."""

    body: Body
    path_params: Mapping[str, Any]
    query_string: bytes = b""

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.query_string.decode("latin-1"), keep_blank_values=True))

    @property
    def content_type(self) -> str:
        return self.metadata.get("content-type", JSON).partition(";")[0].strip().lower()

    def json(self, max_bytes: int, accepted: str = JSON) -> dict[str, Any]:
        """The body as a JSON object. `accepted`: what a 415 says of other content types.

        Raises FarsightError: 400, 413 or 415.
        """
        if self.content_type != JSON:
            raise FarsightError(
                Kind.UNSUPPORTED_MEDIA, f"content-type: expected {accepted}, got {self.content_type[:64]!r}"
            )
        if len(self.body) > max_bytes:
            raise too_large("JSON body (binary tensors may be larger)", len(self.body), max_bytes, "bytes")
        return parse_json(self.body)

    def values(self, max_bytes: int) -> dict[str, Any]:
        """The body as `json` gives it, or the fields and files of a form. Raises FarsightError: 400, 413 or 415."""
        if self.content_type == MULTIPART:
            return parse_form(self.body, self.metadata["content-type"], max_bytes)
        return self.json(max_bytes, f"{JSON} or {MULTIPART}")


class Access(StrEnum):
    """Who may call a route, if the service has tenants."""

    EVERYBODY = "everybody"
    TENANTS = "tenants"
    ADMINS = "admins"


Endpoint = Callable[[HttpCall], Awaitable[Response]]
Route = Callable[[Request], Awaitable[Response]]


class HttpRoutes:
    """Makes routes of endpoints, and collects what the application needs of them."""

    def __init__(self, service: InferenceService, *, id_is_echoed: bool) -> None:
        self.service, self.handler = service, Handler(service)
        self.id_is_echoed = id_is_echoed  # what is in front of us adds x-request-id to every answer
        self.direct: dict[tuple[str, str], Route] = {}  # busy routes, by method and path
        self.schemas: dict[str, Any] = dict(ERROR_SCHEMAS)

    def body_schema(self, model: type[BaseModel]) -> dict[str, Any]:
        """A reference to the schema of a body, for the OpenAPI text."""
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        self.schemas |= schema.pop("$defs", {})
        self.schemas[schema["title"]] = schema
        return {"schema": {"$ref": f"#/components/schemas/{schema['title']}"}}

    def route(self, name: str, endpoint: Endpoint, *, v2: bool = False, access: Access = Access.TENANTS) -> Route:
        """A route named `name` in metrics and logs: authenticates, reads the body, and answers every error."""

        async def respond(request: Request) -> Response:
            given_id = request.headers.get("x-request-id", "")
            scope_route = request.scope.get("route")  # None if a busy route is called directly: no variables
            path = request.scope["path"] if scope_route is None else scope_route.path
            received = Received(
                id=request_id(given_id),
                transport="http",
                endpoint=name,
                name=f"{request.method} {path}",
                received_s=self.service.clock(),
                traceparent=request.headers.get("traceparent"),
                tracestate=request.headers.get("tracestate"),
            )
            work = partial(self._call, request, endpoint, access)
            on_error = partial(error_response, v2=v2)
            response = await self.handler.respond(received, work, on_error, is_followed=name not in PROBES)
            # every answer has its x-request-id once, from us or from what is in front of us
            if not (self.id_is_echoed and received.id == given_id):
                response.headers["x-request-id"] = received.id
            elif "x-request-id" in response.headers:
                del response.headers["x-request-id"]
            return response

        return respond

    def price_response(self, estimate: Estimate) -> Response:
        """The price of a request, for a dry run or an estimate."""
        return json_response(estimate_document(estimate, self.service.hour_usd))

    async def _call(self, request: Request, endpoint: Endpoint, access: Access, record: RequestRecord) -> Response:
        headers, received = dict(request.headers), record.received
        tenant = self._caller(headers, access)
        with self.service.held_bytes() as held:
            body = await read_body(self.service, request, held, tenant.name)
            query = request.scope.get("query_string", b"")
            call = HttpCall(received.id, received.endpoint, record, tenant, headers, body, request.path_params, query)
            response = await endpoint(call)
            if isinstance(response, PartsResponse) and response.size > BLOCK_BYTES:
                # sent after this block: what waits in memory for a slow reader is in flight, too
                held.add(response.size)
                response.held = held.move()
            return response

    def _caller(self, headers: Mapping[str, str], access: Access) -> TenantConfig:
        """The tenant of the key, before its body is read. Raises FarsightError: 401 without a known key, 403 if an
        administrator's is needed."""
        if access is Access.EVERYBODY:
            return DEFAULT_TENANT
        tenant = self.service.tenants.of(key_of(headers))
        if access is Access.ADMINS and not tenant.is_admin:
            raise FarsightError(Kind.FORBIDDEN, f"tenant {tenant.name!r} is not an administrator")
        return tenant
