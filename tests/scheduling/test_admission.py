"""Refusals carry numbers, and a Retry-After that follows from the queue."""

from __future__ import annotations

import pytest

from service.config import Config
from service.core.options import Priority
from service.errors import FarsightError, Kind
from service.scheduling.admission import Admission
from service.scheduling.inflight_bytes import HeldBytes, InFlightBytes


def refused(call: object, *arguments: object, **more: object) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        call(*arguments, **more)  # type: ignore[operator]
    return caught.value


def test_bytes_in_flight_are_taken_and_given_back() -> None:
    config = Config(max_request_bytes=2048, max_json_bytes=1024, max_inflight_bytes=3000)
    inflight = InFlightBytes(config, lambda: 2.5)
    with HeldBytes(inflight) as first, HeldBytes(inflight) as second:
        first.take(2000)
        error = refused(second.take, 1500)
        assert (error.kind, error.retry_after_s) == (Kind.OVERLOADED, 2.5)
        assert "2000" in error.message
        assert "3000" in error.message
    with HeldBytes(inflight) as third:
        third.take(1500)
        assert inflight.total == 1500
        moved = third.move()
    assert inflight.total == 1500
    with moved:
        moved.add(10)
        assert inflight.total == 1510
    assert inflight.total == 0


def test_a_body_over_the_limit_can_never_come_back() -> None:
    with HeldBytes(InFlightBytes(Config(), lambda: 0.0)) as held:
        error = refused(held.take, 3 * 10**9)
    assert error.kind is Kind.TOO_LARGE
    assert "3000000000" in error.message
    assert str(Config().max_request_bytes) in error.message


def test_a_full_queue_says_when_it_can_take_the_request() -> None:
    admission = Admission(Config(max_queue_s=10))
    admission.admit(2.0, 8.0, 100.0, queue=("a", Priority.INTERACTIVE, False))
    error = refused(admission.admit, 2.0, 9.5, 100.0, queue=("a", Priority.INTERACTIVE, False))
    # by a fifth, to 8 s, with the two of this request
    assert (error.kind, error.retry_after_s) == (Kind.OVERLOADED, pytest.approx(3.5))


def test_a_full_queue_is_closed_until_it_has_drained_by_a_fifth() -> None:
    admission = Admission(Config(max_queue_s=10))
    refused(admission.admit, 1.0, 9.5, 100.0, queue=("a", Priority.INTERACTIVE, False))
    assert refused(
        admission.admit, 0.1, 8.0, 100.0, queue=("a", Priority.INTERACTIVE, False)
    ).retry_after_s == pytest.approx(0.1)
    admission.admit(0.1, 8.0, 100.0, queue=("a", Priority.INTERACTIVE, True))  # long work has a queue of its own
    with pytest.raises(FarsightError):
        admission.admit(0.1, 8.0, 100.0, queue=("a", Priority.INTERACTIVE, False), asks_only=True)
    admission.admit(0.1, 7.9, 100.0, queue=("a", Priority.INTERACTIVE, False))
    admission.admit(0.1, 9.0, 100.0, queue=("a", Priority.INTERACTIVE, False))  # and is open until it is full again


def test_a_queue_that_is_full_for_one_tenant_is_open_to_others() -> None:
    admission = Admission(Config(max_queue_s=10))
    refused(admission.admit, 1.0, 9.5, 100.0, queue=("greedy", Priority.INTERACTIVE, False))
    admission.check_open(8.5, "greedy")  # it may be long work, whose queue is open
    refused(admission.admit, 1.0, 9.5, 100.0, queue=("greedy", Priority.INTERACTIVE, True))
    assert refused(admission.check_open, 8.5, "greedy").retry_after_s == pytest.approx(0.5)
    admission.check_open(8.5, "modest")
    admission.admit(0.1, 9.0, 100.0, queue=("modest", Priority.INTERACTIVE, False))
    refused(admission.admit, 0.1, 9.0, 100.0, queue=("greedy", Priority.INTERACTIVE, False))


def test_an_empty_queue_takes_any_request_for_what_others_have_may_never_end() -> None:
    admission, queue = Admission(Config(max_queue_s=10)), ("a", Priority.INTERACTIVE, False)
    refused(admission.admit, 1.0, 9.5, 100.0, queue=queue)
    admission.admit(9.0, 9.0, 100.0, queue=queue, tenant_s=0.0)
    refused(admission.admit, 9.0, 9.0, 100.0, queue=queue, tenant_s=0.1)


def test_an_estimate_closes_nothing() -> None:
    admission = Admission(Config(max_queue_s=10))
    with pytest.raises(FarsightError):
        admission.admit(1.0, 9.5, 100.0, queue=("a", Priority.INTERACTIVE, False), asks_only=True)
    admission.admit(1.0, 8.5, 100.0, queue=("a", Priority.INTERACTIVE, False))


def test_a_request_over_the_queue_limit_runs_when_it_is_alone() -> None:
    admission = Admission(Config(max_queue_s=10))
    admission.admit(60.0, 0.0, 100.0, queue=("a", Priority.INTERACTIVE, False))
    error = refused(admission.admit, 60.0, 3.0, 100.0, queue=("a", Priority.INTERACTIVE, False))
    assert (error.kind, error.retry_after_s) == (Kind.OVERLOADED, 3.0)


def test_a_request_that_would_be_late_is_told_so_at_once() -> None:
    error = refused(Admission(Config()).admit, 2.0, 4.0, 5.0, queue=("a", Priority.INTERACTIVE, False))
    assert error.kind is Kind.DEADLINE
    assert "6 s" in error.message
    assert "timeout of 5 s" in error.message
    assert (
        refused(Admission(Config()).admit, 1.0, 0.0, 5.0, 4.5, queue=("a", Priority.INTERACTIVE, False)).kind
        is Kind.DEADLINE
    )
