"""Order, shares and batches, with a fake clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from service.config import Config
from service.core.options import Priority
from service.scheduling.backlog import PREEMPTION_S
from service.scheduling.batch import Batch, idle_batch
from service.scheduling.fair_shares import LONG_SHARE
from service.scheduling.scheduler import Scheduler, response_ratio
from service.simulate.cluster import Arrival, simulate


@dataclass(frozen=True, eq=False)
class Item:
    name: str
    key: str
    predicted_s: float
    arrived_s: float = 0.0
    priority: Priority = Priority.INTERACTIVE
    shared_s: float = 0.0
    tenant: str = "default"
    peak_bytes: int = 0


def names(batch: Batch[Item] | None) -> list[str]:
    return [item.name for item in batch.items] if batch else []


def run(scheduler: Scheduler[Item], now_s: float) -> list[str]:
    """The next batch, run to its end in the time that was predicted."""
    batch = scheduler.next_batch(now_s)
    if batch is not None:
        scheduler.finished(batch, batch.predicted_s)
    return names(batch)


def begun(scheduler: Scheduler[Item], item: Item) -> Batch[Item]:
    """It is alone, and runs since 0 s."""
    scheduler.add(item)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    return batch


def test_short_work_goes_first() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    scheduler.add(Item("long", "a", 10.0))
    scheduler.add(Item("short", "b", 0.01))
    assert run(scheduler, 1.0) == ["short"]
    assert run(scheduler, 1.0) == ["long"]
    assert run(scheduler, 1.0) == []


def test_a_batch_has_one_key_and_fills_its_slice() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    for index in range(10):
        scheduler.add(Item(f"a{index}", "a", 0.01))
        scheduler.add(Item(f"b{index}", "b", 0.02))
    batch = scheduler.next_batch(5.0)
    assert batch is not None
    assert names(batch) == [f"a{index}" for index in range(5)]  # in order of arrival
    assert batch.predicted_s == pytest.approx(0.05)
    assert len(scheduler) == 15


def test_what_does_not_fit_a_batch_keeps_its_place() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    for name, predicted_s in (("a", 0.03), ("large", 0.04), ("b", 0.01), ("c", 0.01)):
        scheduler.add(Item(name, "k", predicted_s, arrived_s={"a": 0.0}.get(name, 9.9)))
    assert run(scheduler, 10.0) == ["a", "b", "c"]
    assert run(scheduler, 10.0) == ["large"]


def test_what_a_batch_pays_once_counts_once() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.051)
    for index in range(10):
        scheduler.add(Item(str(index), "a", 0.02, shared_s=0.015))
    # two batches: 15 ms each and 5 ms for each request
    assert scheduler.queued_s == pytest.approx(2 * 0.015 + 10 * 0.005)
    assert len(run(scheduler, 1.0)) == 7
    assert len(run(scheduler, 1.0)) == 3


def test_a_batch_stays_within_the_memory() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=1.0, max_bytes=100)
    for index in range(5):
        scheduler.add(Item(str(index), "a", 0.01, peak_bytes=40))
    assert [len(run(scheduler, 1.0)) for _ in range(3)] == [2, 2, 1]


def test_work_over_the_slice_runs_alone() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    scheduler.add(Item("big", "a", 3.0))
    scheduler.add(Item("small", "a", 0.001))
    assert run(scheduler, 10.0) == ["small"]
    assert run(scheduler, 10.0) == ["big"]


def test_short_work_interrupts_long_work_and_is_not_interrupted_by_its_like() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "a", 10.0))
    scheduler.add(Item("short", "b", 0.01, arrived_s=1.0))
    scheduler.served(long, 1.0)
    short = scheduler.next_batch(1.0, [long])
    assert names(short) == ["short"]
    assert short is not None
    scheduler.add(Item("shorter", "c", 0.001, arrived_s=1.0))
    assert scheduler.next_batch(1.0, [long, short]) is None
    scheduler.finished(short, 0.01)
    assert names(scheduler.next_batch(1.01, [long])) == ["shorter"]


def test_work_that_needs_most_of_what_is_left_waits() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "a", 10.0))
    scheduler.add(Item("medium", "b", 2.0, arrived_s=0.0))
    scheduler.served(long, 8.0)
    assert scheduler.next_batch(8.0, [long]) is None
    scheduler.finished(long, 10.0)
    assert run(scheduler, 10.0) == ["medium"]


def test_shorter_long_work_interrupts_once_it_has_waited_relatively_longer() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    hour = begun(scheduler, Item("hour", "a", 3600.0))
    scheduler.add(Item("second", "b", 1.0, arrived_s=10.0))
    scheduler.served(hour, 10.1)
    assert names(scheduler.next_batch(10.1, [hour])) == ["second"]


def test_memory_beside_what_runs_is_respected() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, max_bytes=100)
    long = begun(scheduler, Item("long", "a", 10.0, peak_bytes=80))
    scheduler.add(Item("large", "b", 0.01, peak_bytes=30))
    assert scheduler.next_batch(5.0, [long]) is None
    scheduler.add(Item("small", "c", 0.02, peak_bytes=20))
    assert names(scheduler.next_batch(5.0, [long])) == ["small"]


def test_a_flood_of_short_work_leaves_long_work_its_share() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "long", 10.0))
    now_s, used_s = 0.0, 0.0
    while used_s < 10.0:
        for _ in range(20):  # more than the device can do
            scheduler.add(Item("short", "short", 0.01, arrived_s=now_s))
        now_s, used_s = now_s + 0.04, used_s + 0.04
        scheduler.served(long, used_s)
        while (short := scheduler.next_batch(now_s, [long])) is not None:
            now_s += short.predicted_s
            scheduler.finished(short, short.predicted_s)
    assert used_s / now_s == pytest.approx(LONG_SHARE, rel=0.05)


def test_batch_class_gets_a_tenth_and_all_that_nobody_wants() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    served = {Priority.INTERACTIVE: 0, Priority.BATCH: 0}
    for index in range(2000):
        for priority in Priority:
            scheduler.add(Item(priority, f"{priority}{index}", 0.01, priority=priority))
    for _ in range(1000):
        served[Priority(run(scheduler, 1.0)[0])] += 1
    assert served[Priority.BATCH] == pytest.approx(100, abs=2)
    for _ in range(3000):
        served[Priority(run(scheduler, 1.0)[0])] += 1
    assert served[Priority.BATCH] == 2000


def test_tenants_share_by_weight_whatever_each_of_them_sends() -> None:
    weights = {"gold": 3.0}
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, tenant_weights=weights)
    for index in range(3000):
        scheduler.add(Item("flood", f"f{index}", 0.01))
    for index in range(800):
        scheduler.add(Item("gold", f"g{index}", 0.02, tenant="gold"))
    seconds = {"flood": 0.0, "gold": 0.0}
    for _ in range(1000):
        name = run(scheduler, 5.0)[0]
        seconds[name] += {"flood": 0.01, "gold": 0.02}[name]
    assert seconds["gold"] / sum(seconds.values()) == pytest.approx(0.75, rel=0.02)


def test_tenants_take_turns_within_one_batch() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.1)
    for _ in range(100):
        scheduler.add(Item("flood", "k", 0.01))
    for _ in range(10):
        scheduler.add(Item("other", "k", 0.01, tenant="other"))
    first = run(scheduler, 1.0)
    assert first.count("other") == first.count("flood") == 5


def test_a_share_is_not_saved_up() -> None:
    """An hour of long work alone gives short work no hour of its own, nor the other way round."""
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "a", 7200.0))
    scheduler.served(long, 3600.0)
    ran_s = 0.0
    for index in range(1000):
        scheduler.add(Item("short", str(index), 0.01, arrived_s=3600.0))
    while (short := scheduler.next_batch(3600.0 + ran_s, [long])) is not None:
        scheduler.finished(short, 0.01)
        ran_s += 0.01
    assert ran_s <= 0.02


def test_measured_time_replaces_predicted_time_in_the_shares() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    for index in range(400):
        scheduler.add(Item("liar", f"l{index}", 0.001))  # takes ten times as long
        scheduler.add(Item("honest", f"h{index}", 0.01, tenant="honest"))
    seconds = {"liar": 0.0, "honest": 0.0}
    for _ in range(400):
        batch = scheduler.next_batch(1.0)
        assert batch is not None
        scheduler.finished(batch, 0.01)
        seconds[batch.items[0].name] += 0.01
    assert seconds["liar"] == pytest.approx(seconds["honest"], rel=0.05)


def test_what_has_no_claim_gives_way_to_all() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, max_bytes=100)
    audit = idle_batch(Item("audit", "x", 0.01, peak_bytes=50))
    scheduler.add(Item("long", "a", 10.0, priority=Priority.BATCH, peak_bytes=40))
    assert names(scheduler.next_batch(0.0, [audit])) == ["long"]
    scheduler.add(Item("large", "a", 1.0, peak_bytes=60))
    assert scheduler.next_batch(0.0, [audit]) is None


def test_a_cancelled_request_leaves_no_trace() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    item = Item("a", "k", 0.01)
    scheduler.add(item)
    assert scheduler.discard(item)
    assert not scheduler.discard(item)
    assert (len(scheduler), scheduler.queued_s, scheduler.next_batch(1.0)) == (0, 0.0, None)


def test_long_work_lets_short_work_pass_and_waits_for_all() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "a", 10.0))
    scheduler.served(long, 4.0)
    scheduler.add(Item("next", "b", 5.0))
    scheduler.add(Item("short", "c", 0.02))
    assert told(scheduler, 0.01, running=[long]) == pytest.approx(0.02 + PREEMPTION_S)
    assert told(scheduler, 1.0, running=[long]) == pytest.approx(6.0 + 5.0 + 0.02)
    assert scheduler.backlog_s([long]) == pytest.approx(6.0 + 5.0 + 0.02)


def told(
    scheduler: Scheduler[Item],
    seconds: float,
    tenant: str = "default",
    priority: Priority = Priority.INTERACTIVE,
    running: Sequence[Batch[Item]] = (),
) -> float:
    return scheduler.ahead(seconds, priority, tenant, running)[0]


@pytest.mark.parametrize("seconds", [0.01, 1.0])
def test_who_asks_for_little_is_not_told_to_wait_for_who_asks_for_much(seconds: float) -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, tenant_weights={"gold": 2.0})
    for index in range(100):
        scheduler.add(Item(f"{index}", f"{index}", seconds, tenant="greedy"))
    assert told(scheduler, seconds, "greedy") == pytest.approx(100 * seconds)
    assert told(scheduler, seconds, "modest") == pytest.approx(seconds)  # turn by turn
    assert told(scheduler, seconds, "gold") == pytest.approx(seconds / 2)  # two of three turns
    scheduler.add(Item("own", "own", seconds, tenant="modest"))
    ahead_s, own_s = scheduler.ahead(seconds, Priority.INTERACTIVE, "modest", [])
    assert (ahead_s, own_s) == (pytest.approx(3 * seconds), pytest.approx(seconds))
    assert told(scheduler, seconds, "greedy") == pytest.approx(101 * seconds)  # all that the modest one has
    while (batch := scheduler.next_batch(0.0)) is not None:
        scheduler.finished(batch, batch.predicted_s)
    assert scheduler.ahead(seconds, Priority.INTERACTIVE, "greedy", []) == (0.0, 0.0)


def test_long_work_of_others_that_runs_counts_up_to_its_share() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    long = begun(scheduler, Item("long", "a", 10.0, tenant="greedy"))
    assert scheduler.ahead(2.0, Priority.INTERACTIVE, "modest", [long]) == (pytest.approx(2.0), 0.0)
    assert scheduler.ahead(2.0, Priority.INTERACTIVE, "greedy", [long]) == (pytest.approx(10.0), pytest.approx(10.0))


def test_short_work_delays_long_work_up_to_its_share() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    for index in range(1000):
        scheduler.add(Item(f"{index}", f"{index}", 0.05))
    assert told(scheduler, 1.0) == pytest.approx(1.0 * 0.75 / 0.25)
    assert told(scheduler, 100.0) == pytest.approx(50.0)


def test_the_other_class_counts_up_to_its_share() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    for index in range(30):
        scheduler.add(Item(f"i{index}", f"i{index}", 1.0))
        scheduler.add(Item(f"b{index}", f"b{index}", 1.0, priority=Priority.BATCH))
    assert told(scheduler, 6.0) == pytest.approx(30 + 36 / 9)
    assert told(scheduler, 1.0, priority=Priority.BATCH) == pytest.approx(30 + 30)
    assert told(scheduler, 1.0, "new", Priority.BATCH) == pytest.approx(1 + 9 * 2)
    assert told(scheduler, 0.01) == 0.0  # the long work of both lets it pass


def test_a_tenant_s_new_weight_counts_from_its_next_request() -> None:
    weights = {"a": 1.0, "b": 1.0}
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05, tenant_weights=weights)
    for index in range(100):
        for name in weights:
            scheduler.add(Item(name, f"{name}{index}", 0.02, tenant=name))
    assert [run(scheduler, 0.0)[0] for _ in range(20)].count("a") == 10
    weights["a"] = 9.0
    scheduler.add(Item("a", "next", 0.02, tenant="a"))
    assert [run(scheduler, 0.0)[0] for _ in range(20)].count("a") >= 17


def test_queued_seconds_follow_every_change() -> None:
    scheduler: Scheduler[Item] = Scheduler(batch_budget_s=0.05)
    generator = random.Random(0)
    items = [Item(str(index), str(generator.randrange(3)), generator.random()) for index in range(200)]
    waiting = set()
    for item in items:
        scheduler.add(item)
        waiting.add(item)
        if generator.random() < 0.3:
            gone = generator.choice(sorted(waiting, key=lambda one: one.name))
            assert scheduler.discard(gone)
            waiting.discard(gone)
        if generator.random() < 0.2 and (batch := scheduler.next_batch(1.0)) is not None:
            waiting -= set(batch.items)
        assert abs(scheduler.queued_s - sum(one.predicted_s for one in waiting)) < 1e-9
    while (batch := scheduler.next_batch(2.0)) is not None:
        waiting -= set(batch.items)
    assert not waiting
    assert scheduler.queued_s == 0.0


def test_response_ratio() -> None:
    item = Item("a", "k", 2.0, arrived_s=1.0)
    assert response_ratio(item, 1.0) == 1.0
    assert response_ratio(item, 7.0) == 4.0
    assert response_ratio(item, 7.0, used_s=4.0) == 2.0


@pytest.mark.parametrize("load", [0.7, 1.5])
def test_nothing_waits_longer_than_the_bound(load: float) -> None:
    """10^5 random arrivals of five orders of magnitude, two classes, three tenants: below capacity and far over it."""
    generator = random.Random(1)
    config = Config(max_queue_s=5.0, default_timeout_s=1e9)
    longest_s, now_s, trace = 20.0, 0.0, []
    for index in range(100_000):
        predicted_s = min(longest_s, 10 ** generator.gauss(-2.2, 0.8))
        now_s += generator.expovariate(load / 0.031)  # their mean
        trace.append(
            Arrival(
                now_s,
                predicted_s,
                key=index % 7 if predicted_s < 0.1 else index,
                priority=Priority.BATCH if generator.random() < 0.2 else Priority.INTERACTIVE,
                tenant=generator.choice("abc"),
            )
        )
    simulate(trace, 1, config)
    # of a tenth for the batch class, a third for the tenant, a quarter for long work
    smallest_share = 0.1 / 3 * LONG_SHARE
    bound_s = config.max_queue_s + (config.max_queue_s + 3 * longest_s) / smallest_share
    answered = [one for one in trace if one.refused is None]
    assert all(one.finished_s is not None for one in answered)
    waits_s = [one.started_s - one.arrived_s for one in answered if one.started_s is not None]
    assert max(waits_s) <= bound_s
    refused_s = sum(one.predicted_s for one in trace if one.refused is not None)
    assert (refused_s > 0.3 * sum(one.predicted_s for one in trace)) == (load > 1)  # refused, not kept waiting
    # what short work waits has nothing to do with the longest
    short = sorted(
        one.started_s - one.arrived_s
        for one in answered
        if one.predicted_s < 0.01 and one.priority is Priority.INTERACTIVE and one.started_s is not None
    )
    if load < 1:
        assert short[int(0.99 * len(short))] < 0.3
