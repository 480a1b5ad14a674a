"""Schemathesis on our own OpenAPI text: every answer has a documented status, content type and schema."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis.errors import Unsatisfiable
from schemathesis import checks

from service.api.http.app import create_app
from service.engine.engine import Engine
from tests.fuzz.conftest import CASES, each
from tests.fuzz.sent import SLOWEST_S, UNPARSED, Tally

CHECKS = (
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
)


def test_every_operation_answers_as_documented(engine: Engine, tally: Tally, subtests: pytest.Subtests) -> None:
    tally.name = "openapi"
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine))

    def send(case: Any) -> None:
        start_s = time.perf_counter()
        response = case.call()
        seconds = time.perf_counter() - start_s
        tally.add(
            f"{case.operation.method.upper()} {case.operation.path}",
            str(response.status_code),
            seconds,
            is_parsed=response.status_code not in UNPARSED,
        )
        assert seconds < SLOWEST_S
        assert len(response.headers.get("x-request-id", [])) == 1
        case.validate_response(response, checks=CHECKS)

    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 15
    for operation in found:
        for mode in schemathesis.GenerationMode:
            with subtests.test(operation.label, mode=mode.value), suppress(Unsatisfiable):  # nothing to get wrong
                each(operation.as_strategy(generation_mode=mode), send, max(20, CASES // 10))
