"""Host work is shared fairly: short work at once, tenants by their shares, nothing of one tenant everywhere."""

from __future__ import annotations

from collections import Counter

from service.core.host_work import HostKind
from service.core.options import Priority
from service.scheduling.host_queue import MOST_PAUSED, HostQueue, HostTask, Slots

LONG_S, SHORT_S = 2.0, 0.001
SLOTS = Slots.of(8)


class Host:
    """A queue, and the tasks that it has begun, in order."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.queue = HostQueue(weights or {}, SLOTS)
        self.begun: list[HostTask] = []

    def put(
        self,
        tenant: str,
        predicted_s: float,
        kind: HostKind = HostKind.TEXT,
        priority: Priority = Priority.INTERACTIVE,
    ) -> HostTask:
        task = HostTask(kind, tenant, priority, predicted_s, lambda: self.begun.append(task))
        self.queue.put(task)
        self.queue.start()
        return task

    def end(self, task: HostTask, used_s: float | None = None) -> None:
        self.queue.stopped(task, task.predicted_s if used_s is None else used_s)
        self.queue.start()

    def pause(self, task: HostTask, used_s: float) -> None:
        self.queue.stopped(task, used_s)
        self.queue.put(task)
        self.queue.start()


def test_short_work_begins_at_once_next_to_any_long_work() -> None:
    host = Host()
    for tenant in "abcd":
        for _ in range(5):
            host.put(tenant, LONG_S)
    assert len(host.begun) == SLOTS.long < SLOTS.total
    short = host.put("e", SHORT_S)
    assert host.begun[-1] is short


def test_one_tenant_leaves_a_slot_of_long_work_to_others() -> None:
    host = Host()
    for _ in range(10):
        host.put("loud", LONG_S)
    assert len(host.begun) == SLOTS.of_tenant < SLOTS.long
    quiet = host.put("quiet", LONG_S)
    assert host.begun[-1] is quiet


def test_tenants_get_thread_seconds_by_their_weights() -> None:
    host = Host({"heavy": 2.0})
    tasks = [host.put(tenant, 1.0) for tenant in ("light", "heavy", "other") for _ in range(200)]
    used_s: Counter[str] = Counter()
    running = list(host.begun)
    while used_s.total() < 200:
        task = running.pop(0)
        seen = len(host.begun)
        host.end(task, 1.0)
        used_s[task.tenant] += 1
        running += host.begun[seen:]
    assert len(tasks) == 600
    assert 1.8 < used_s["heavy"] / used_s["light"] < 2.2
    assert 0.9 < used_s["light"] / used_s["other"] < 1.1


def test_paused_work_goes_on_before_new_work_of_its_tenant_and_after_others() -> None:
    host = Host()
    first, second, third = (host.put("loud", LONG_S) for _ in range(3))
    assert host.begun == [first, second]
    assert not host.queue.others_wait(first)  # only its own tenant's
    fillers = [host.put(tenant, LONG_S) for tenant in "xy"]
    assert host.begun == [first, second, fillers[0]]
    assert host.queue.others_wait(first)
    host.pause(first, 0.05)
    assert host.begun[-1] is fillers[1]
    host.end(fillers[0])
    assert host.begun[-1] is first  # not the third, which came later
    assert third not in host.begun


def test_no_more_work_pauses_than_there_are_threads_for() -> None:
    host = Host()
    tasks = []
    for index in range(MOST_PAUSED + SLOTS.long + 2):
        tasks.append(host.put(f"tenant {index}", LONG_S))
    paused = 0
    while host.queue.others_wait(host.begun[-1]):
        host.pause(host.begun[-1], 0.05)
        paused += 1
        assert paused <= MOST_PAUSED
    assert host.queue.paused == MOST_PAUSED


def test_large_images_are_decoded_one_at_a_time() -> None:
    host = Host()
    first, second = (host.put(tenant, LONG_S, HostKind.IMAGE) for tenant in "ab")
    assert host.begun == [first]
    text = host.put("c", LONG_S)
    assert host.begun == [first, text]
    small = host.put("d", SHORT_S, HostKind.IMAGE)
    assert host.begun[-1] is small
    host.end(first)
    assert host.begun[-1] is second


def test_interactive_work_has_nine_tenths_while_batch_work_waits() -> None:
    host = Host()
    for _ in range(300):
        host.put("a", 1.0, priority=Priority.BATCH)
        host.put("b", 1.0)
        host.put("c", 1.0)
    used_s: Counter[Priority] = Counter()
    running = list(host.begun)
    for _ in range(200):
        task = running.pop(0)
        seen = len(host.begun)
        host.end(task)
        used_s[task.priority] += 1
        running += host.begun[seen:]
    assert 0.85 < used_s[Priority.INTERACTIVE] / used_s.total() < 0.95


def test_what_is_discarded_never_begins_and_leaves_no_share_behind() -> None:
    host = Host()
    running = [host.put("a", LONG_S) for _ in range(SLOTS.of_tenant)]
    waiting = host.put("a", LONG_S)
    assert host.queue.ahead_s("a") == (SLOTS.of_tenant + 1) * LONG_S
    assert host.queue.discard(waiting)
    assert not host.queue.discard(waiting)
    assert not host.queue.discard(running[0])
    for task in running:
        host.end(task)
    assert host.begun == running
    assert host.queue.ahead_s("a") == 0 == len(host.queue)


def test_slots_follow_the_cores() -> None:
    assert [(Slots.of(cores).total, Slots.of(cores).long, Slots.of(cores).of_tenant) for cores in (1, 2, 4, 64)] == [
        (3, 2, 1),
        (3, 2, 1),
        (4, 3, 2),
        (4, 3, 2),
    ]


def test_work_without_room_does_not_block_what_is_behind_it() -> None:
    host = Host()
    host.put("b", LONG_S, HostKind.IMAGE)
    image = host.put("a", LONG_S, HostKind.IMAGE)
    text = host.put("a", LONG_S)
    assert host.begun[-1] is text
    assert image not in host.begun


def test_answers_are_written_before_more_is_read() -> None:
    host = Host()
    running = [host.put("a", LONG_S) for _ in range(SLOTS.of_tenant)]
    reading, answer = host.put("a", LONG_S), host.put("a", LONG_S, HostKind.RENDER)
    host.end(running[0])
    assert host.begun[-1] is answer
    host.end(running[1])
    assert host.begun[-1] is reading


def test_work_that_was_predicted_too_short_is_long_once_it_pauses() -> None:
    host = Host()
    task = host.put("a", SHORT_S)
    assert host.queue.long_running == 0
    host.pause(task, 1.0)
    assert task.is_long
    assert host.begun == [task, task]
    assert host.queue.long_running == 1
    host.end(task, 1.0)
    assert host.queue.long_running == 0
