"""Order and batches, with time driven by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass

from service.core import Priority
from service.engine.scheduler import BATCH_SHARE, Scheduler, response_ratio


@dataclass(frozen=True, eq=False)
class Item:
    name: str
    key: str
    predicted_s: float
    arrived_s: float = 0.0
    priority: Priority = Priority.INTERACTIVE
    shared_s: float = 0.0


def names(batch: list[Item]) -> list[str]:
    return [item.name for item in batch]


def test_short_work_goes_first() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    scheduler.add(Item("long", "a", 10.0))
    scheduler.add(Item("short", "b", 0.01))
    assert names(scheduler.next_batch(1.0)) == ["short"]
    assert names(scheduler.next_batch(1.0)) == ["long"]
    assert scheduler.next_batch(1.0) == []


def test_long_work_does_not_starve_under_a_stream_of_short_work() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    scheduler.add(Item("long", "long", 1.0))
    now_s, served = 0.0, 0
    while served < 10_000:
        scheduler.add(Item("short", str(served), 0.01, arrived_s=now_s - 0.005))
        batch = scheduler.next_batch(now_s)
        if names(batch) == ["long"]:
            break
        served += 1
        now_s += 0.01
    # a fresh short request has ratio 1.5: the long one passes it after half of its own predicted time
    assert now_s < 0.6


def test_a_batch_has_one_key_and_fills_its_slice() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    for index in range(10):
        scheduler.add(Item(f"a{index}", "a", 0.01))
        scheduler.add(Item(f"b{index}", "b", 0.02))
    batch = scheduler.next_batch(5.0)
    assert {item.key for item in batch} == {"a"}
    assert sum(item.predicted_s for item in batch) <= 0.05 + 1e-9
    assert len(batch) == 5
    assert len(scheduler) == 15


def test_what_a_batch_pays_once_counts_once() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.051)
    for index in range(10):
        scheduler.add(Item(str(index), "a", 0.02, shared_s=0.015))
    assert len(scheduler.next_batch(1.0)) == 7  # 15 ms once and 5 ms each


def test_work_over_the_slice_runs_alone() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    scheduler.add(Item("big", "a", 3.0))
    scheduler.add(Item("small", "a", 0.001, arrived_s=9.999))
    assert names(scheduler.next_batch(10.0)) in (["big"], ["small"])
    assert len(scheduler) == 1


def test_batch_class_waits_for_interactive_work_and_still_runs() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    patient = Item("patient", "p", 0.01, priority=Priority.BATCH)
    scheduler.add(patient)
    scheduler.add(Item("eager", "e", 0.01))
    assert names(scheduler.next_batch(0.0)) == ["eager"]
    waited_s = 1.0
    assert response_ratio(patient, waited_s) == BATCH_SHARE * 101
    scheduler.add(Item("fresh", "f", 0.01, arrived_s=waited_s))
    assert names(scheduler.next_batch(waited_s)) == ["patient"]


def test_queued_seconds_follow_every_change() -> None:
    scheduler: Scheduler[Item] = Scheduler(target_slice_s=0.05)
    generator = random.Random(0)
    items = [Item(str(index), str(generator.randrange(3)), generator.random()) for index in range(200)]
    waiting = set()
    for item in items:
        scheduler.add(item)
        waiting.add(item)
        if generator.random() < 0.3:
            gone = generator.choice(sorted(waiting, key=lambda one: one.name))
            assert scheduler.discard(gone)
            assert not scheduler.discard(gone)
            waiting.discard(gone)
        if generator.random() < 0.2:
            waiting -= set(scheduler.next_batch(1.0))
        assert abs(scheduler.queued_s - sum(one.predicted_s for one in waiting)) < 1e-9
    while batch := scheduler.next_batch(2.0):
        waiting -= set(batch)
    assert not waiting
    assert scheduler.queued_s == 0.0
