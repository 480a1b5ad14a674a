"""The fields of usage and error, as bodies, headers, log lines and the ledger use them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from service.api.answer import document, headers
from service.core.answer import Answer, ErrorReport, Timing, Usage, error_fields, usage_fields
from service.core.plan import Cost, Plan, PlanKind

USAGE = Usage(1, 2, 3, 4, 5, 0.25, 6, 1e-6, 2e-6, truncated=7, dropped_tokens=8, chunks=9, joules=0.5, carbon_g=0.125)
UNKNOWN = {"chunks": 0, "joules": None, "carbon_g": None}


def test_usage_has_all_its_fields_and_leaves_unknown_ones_out() -> None:
    assert usage_fields(USAGE) == {field.name: getattr(USAGE, field.name) for field in fields(Usage)}
    assert usage_fields(USAGE).keys() - usage_fields(replace(USAGE, **UNKNOWN)).keys() == UNKNOWN.keys()
    assert usage_fields(replace(USAGE, joules=0.0, carbon_g=0.0))["joules"] == 0.0


def test_an_exact_answer_has_no_measured_error() -> None:
    assert error_fields(ErrorReport()) == {"kind": "exact", "fallback": False}
    replaced = ErrorReport(fallback=True, rejected_relative_l2_upper=0.5)
    assert error_fields(replaced) == {"kind": "exact", "fallback": True, "rejected_relative_l2_upper": 0.5}
    certified = ErrorReport("measured", certified_unread=0.0)
    assert error_fields(certified).keys() == {field.name for field in fields(ErrorReport)} - {
        "rejected_relative_l2_upper"
    }


@pytest.mark.parametrize("usage", [USAGE, replace(USAGE, **UNKNOWN)])
def test_body_and_headers_show_the_same_usage(usage: Usage) -> None:
    plan = Plan(PlanKind.DENSE, Cost(1, 2, 3, 4), 0.5, "short")
    answer = Answer("req-1", {}, plan, ErrorReport(), usage, Timing(0.125, 0.25, 0.5), batch_requests=3)
    body, shown = document(answer), usage_fields(usage)
    assert body["cost"] == {"usd": shown.pop("cost_usd"), "saved_usd": shown.pop("saved_usd")}
    assert body["usage"] == {**shown, "batch_requests": 3}
    assert list(body["usage"])[6:9] == ["peak_bytes", "batch_requests", "truncated"]
    assert headers(answer)["x-compute-tokens"] == str(shown["tokens"])
    assert headers(answer).get("x-energy-joules") == ("0.500000" if "joules" in shown else None)
