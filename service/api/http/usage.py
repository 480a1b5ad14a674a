"""`GET /v1/usage`: what was used and what it cost, from the ledger."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import HttpCall, HttpRoutes
from service.api.http.responses import error_responses, json_response
from service.api.service import InferenceService
from service.billing.query import DAY_S, GROUPS, WIDTHS_S, group_names, moment, time_of
from service.errors import Kind, invalid

PARAMETERS = {
    "from": "Date, time or seconds since 1970; default a day before `to`.",
    "to": "Not included; default now.",
    "group_by": f"Any of {', '.join(GROUPS)}, separated by commas; default tenant,model.",
}


def usage_document(
    found: dict[str, Any], from_s: float, to_s: float, group_by: tuple[str, ...], *, is_whole: bool
) -> dict[str, Any]:
    """Sums by group. `allocated_usd` is a group's part, by what it used, of what the devices cost, idle time included,
    and its host work; only for an administrator, who sees the whole."""
    capacity = found["capacity"]
    used_usd = capacity["usd"] * capacity["used_s"] / (capacity["used_s"] + capacity["idle_s"] or 1.0)
    data = []
    for row in found["groups"]:
        shown = {name: time_of(value) if name in WIDTHS_S else value for name, value in row.items()}
        if used_usd and is_whole:
            device_usd = row["cost_usd"] - row["host_usd"]
            shown["allocated_usd"] = device_usd * capacity["usd"] / used_usd + row["host_usd"]
        data.append(shown)
    document = {"object": "list", "from": time_of(from_s), "to": time_of(to_s), "group_by": group_by, "data": data}
    return document | ({"capacity": capacity} if is_whole else {})


async def usage(service: InferenceService, call: HttpCall) -> Response:
    """Tenants see their own usage, administrators everybody's. Raises FarsightError."""
    unknown = call.query.keys() - PARAMETERS.keys()
    if unknown:
        raise invalid(f"unknown parameter {next(iter(unknown))[:32]!r}; expected one of {', '.join(PARAMETERS)}")
    to_s = _moment(call, "to", time.time() + 1.0)  # includes what was accepted in this second
    from_s = _moment(call, "from", max(0.0, to_s - DAY_S))
    if not from_s < to_s:
        raise invalid(f"from: expected a time before {time_of(to_s)}, got {time_of(from_s)}", param="from")
    try:
        group_by = group_names(call.query.get("group_by", "tenant,model"))
    except ValueError as error:
        raise invalid(str(error), param="group_by") from None
    tenant = None if call.tenant.is_admin else call.tenant.name
    found = await service.usage(from_s, to_s, group_by, tenant)
    return json_response(usage_document(found, from_s, to_s, group_by, is_whole=tenant is None))


def _moment(call: HttpCall, name: str, default_s: float) -> float:
    """Seconds since 1970."""
    try:
        return moment(call.query[name]) if name in call.query else default_s
    except ValueError as error:
        raise invalid(f"{name}: {error}", param=name) from None


def add_routes(app: FastAPI, routes: HttpRoutes) -> None:
    parameters = [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in PARAMETERS.items()
    ]
    app.add_api_route(
        "/v1/usage",
        routes.route("usage", partial(usage, routes.service)),
        methods=["GET"],
        tags=["cost"],
        summary="What was used and what it cost; tenants see their own usage, administrators everybody's",
        responses=error_responses(Kind.UNAUTHENTICATED, Kind.INVALID, Kind.NOT_FOUND),
        openapi_extra={"parameters": parameters},
    )
