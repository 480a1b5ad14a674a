"""What a device does next and which work passes which, with times given by the test."""

from __future__ import annotations

import pytest

from service.scheduling.device_loop import DeviceLoop
from service.scheduling.scheduler import Scheduler
from tests.scheduling.test_scheduler import Item, names


def loop_of(max_bytes: int | None = None) -> DeviceLoop[Item]:
    limits = {} if max_bytes is None else {"max_bytes": max_bytes}
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, **limits)  # type: ignore[arg-type]
    return DeviceLoop(scheduler, 0.0)


def test_short_work_interrupts_long_work_at_a_checkpoint_and_nothing_else_does() -> None:
    loop = loop_of()
    loop.add(Item("long", "a", 10.0))
    long = loop.start(0.0)
    assert long is not None
    assert loop.checkpoint(1.0, 1.0) is None  # nothing waits
    loop.add(Item("short", "b", 0.01, arrived_s=1.5))
    short = loop.checkpoint(2.0, 2.0)
    assert names(short) == ["short"]
    assert short is not None
    assert loop.running == [long, short]
    loop.finish(short, 0.01)
    assert loop.running == [long]
    loop.add(Item("another long one", "a", 5.0, arrived_s=2.5))
    assert loop.checkpoint(3.0, 3.01) is None  # would run as long itself
    loop.finish(long, 10.0)
    assert loop.used_and_idle_s(10.51) == pytest.approx((10.01, 0.5))
    assert loop.waiting == 1


def test_idle_work_starts_only_when_nothing_waits_and_any_request_interrupts_it() -> None:
    loop = loop_of()
    loop.add_idle(Item("audit", "a", 1.0))
    loop.add(Item("long", "b", 10.0))
    first = loop.start(0.0)
    assert names(first) == ["long"]
    assert first is not None
    loop.finish(first, 10.0)
    audit = loop.start(10.0)
    assert names(audit) == ["audit"]
    assert audit is not None
    assert (loop.idle_waiting, loop.backlog_s()) == (0, 0.0)  # it delays no request
    loop.add(Item("long again", "b", 10.0, arrived_s=10.5))
    assert names(loop.checkpoint(0.5, 10.5)) == ["long again"]
    assert not audit.is_evicted


def test_idle_work_is_evicted_if_no_request_fits_in_memory_beside_it() -> None:
    loop = loop_of(max_bytes=100)
    loop.add_idle(Item("audit", "a", 1.0, peak_bytes=60))
    audit = loop.start(0.0)
    assert audit is not None
    assert loop.checkpoint(0.1, 0.1) is None
    assert not audit.is_evicted
    loop.add(Item("large", "b", 1.0, arrived_s=0.2, peak_bytes=80))
    assert loop.checkpoint(0.2, 0.2) is None
    assert audit.is_evicted
    loop.finish(audit, 0.2)
    assert names(loop.start(0.2)) == ["large"]


def test_the_busy_share_counts_requests_alone() -> None:
    loop = loop_of()
    loop.add_idle(Item("audit", "a", 1.0))
    audit = loop.start(0.0)
    assert audit is not None
    loop.finish(audit, 2.0)
    assert loop.busy_share(2.0) == 0.0
    loop.add(Item("one", "b", 1.0, arrived_s=2.0))
    one = loop.start(2.0)
    assert one is not None
    loop.checkpoint(0.5, 2.5)
    assert loop.busy_share(3.0) == pytest.approx(0.5)  # of the second since the last question
    loop.finish(one, 1.5)
    assert loop.busy_share(4.0) == pytest.approx(1.0)
