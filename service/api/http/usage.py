"""`GET /v1/usage`: what was used and what it cost, from the ledger."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from service.api.http.endpoint import Call, Http
from service.api.http.responses import error_responses, json_response
from service.billing.query import (
    DAY_S,
    GROUPS,
    WIDTHS_S,
    group_names,
    moment,
    time_of,
)
from service.errors import FarsightError, Kind, invalid


def _moment(call: Call, name: str, default_s: float) -> float:
    try:
        return moment(call.query[name]) if name in call.query else default_s
    except ValueError as error:
        raise invalid(f"{name}: {error}", param=name) from None


def usage_document(
    found: dict[str, Any], from_s: float, to_s: float, group_by: tuple[str, ...], *, is_whole: bool
) -> dict[str, Any]:
    """Sums by group. `allocated_usd`: a group's part, by what it used, of what the devices cost, idle time included."""
    capacity = found["capacity"]
    used_usd = capacity["usd"] * capacity["used_s"] / (capacity["used_s"] + capacity["idle_s"] or 1.0)
    data = []
    for row in found["groups"]:
        told = {name: time_of(value) if name in WIDTHS_S else value for name, value in row.items()}
        if used_usd and is_whole:
            told["allocated_usd"] = row["cost_usd"] * capacity["usd"] / used_usd
        data.append(told)
    document = {"object": "list", "from": time_of(from_s), "to": time_of(to_s), "group_by": group_by, "data": data}
    return document | ({"capacity": capacity} if is_whole else {})


def add_routes(app: FastAPI, http: Http) -> None:
    engine = http.engine

    async def usage(call: Call) -> Response:
        if engine.books is None:
            raise FarsightError(Kind.NOT_FOUND, "this service keeps no ledger")
        unknown = call.query.keys() - {"from", "to", "group_by"}
        if unknown:
            raise invalid(f"{next(iter(unknown))[:32]!r} is none of from, to, group_by")
        to_s = _moment(call, "to", time.time() + 1.0)  # what was accepted in this second is there
        from_s = _moment(call, "from", max(0.0, to_s - DAY_S))
        if not from_s < to_s:
            raise invalid(f"from {time_of(from_s)} is not before to {time_of(to_s)}", param="from")
        try:
            group_by = group_names(call.query.get("group_by", "tenant,model"))
        except ValueError as error:
            raise invalid(str(error), param="group_by") from None
        tenant = None if call.tenant.is_admin else call.tenant.name
        found = await engine.books.usage(from_s, to_s, group_by, tenant)
        return json_response(usage_document(found, from_s, to_s, group_by, is_whole=tenant is None))

    def parameter(name: str, text: str) -> dict[str, Any]:
        return {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}

    app.add_api_route(
        "/v1/usage",
        http.endpoint("usage", usage),
        methods=["GET"],
        tags=["cost"],
        summary="What was used and what it cost; tenants see their own, administrators everybody's",
        responses=error_responses(Kind.UNAUTHENTICATED, Kind.INVALID, Kind.NOT_FOUND),
        openapi_extra={
            "parameters": [
                parameter("from", "Date, time or seconds since 1970; default a day before `to`."),
                parameter("to", "Not included; default now."),
                parameter("group_by", f"Any of {', '.join(GROUPS)}, with commas; default tenant,model."),
            ]
        },
    )
