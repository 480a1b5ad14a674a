"""The error table: complete, spelled right for both transports, and equal to the OpenAPI text."""

from __future__ import annotations

import grpc
import pytest

from service.api.http.app import errors_table
from service.errors import CODES, FarsightError, Kind, too_large


def test_every_kind_has_one_code_on_both_transports() -> None:
    assert set(CODES) == set(Kind)
    for kind, code in CODES.items():
        assert code.grpc in {status.name for status in grpc.StatusCode}, kind
        assert 400 <= code.http < 600, kind
        assert code.meaning.endswith(".")


def test_what_can_never_fit_does_not_invite_a_retry() -> None:
    assert not CODES[Kind.TOO_LARGE].retryable
    assert CODES[Kind.TOO_LARGE].grpc != "RESOURCE_EXHAUSTED"
    retryable = {kind for kind, code in CODES.items() if code.retryable}
    assert retryable == {Kind.OVERLOADED, Kind.OVER_BUDGET, Kind.DEADLINE, Kind.UNAVAILABLE, Kind.OUT_OF_MEMORY}


@pytest.mark.parametrize("kind", Kind)
def test_openapi_text_shows_the_table(kind: Kind) -> None:
    code = CODES[kind]
    assert f"| {code.http} | {code.grpc} | {code.meaning} |" in errors_table()


def test_errors_carry_numbers_and_field() -> None:
    error = too_large("input 3", 700, 512, "tokens", param="input")
    assert error.message == "input 3: 700 tokens is over the limit of 512 tokens"
    assert (error.kind, error.param, error.code) == (Kind.TOO_LARGE, "input", "too_large")
    assert len(FarsightError(Kind.INVALID, "x" * 10**6, param="y" * 10**6).message) == 1000
