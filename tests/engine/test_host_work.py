"""Reading inputs is work: it is shared, refused, ended, paid for and recorded like work of the device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.attention.output import Checkpoint
from service.billing.ledger import LedgerError, LocalLedger
from service.billing.metering import UsageMeter
from service.billing.tenants import Tenants
from service.config import Budget, Config, TenantConfig
from service.core.host_work import HostAsk, HostKind
from service.engine.host_work import HostWork
from service.errors import FarsightError, Kind
from service.telemetry.metrics import Metrics
from service.telemetry.request_record import Received, RequestRecord
from tests.engine.test_engine import total

HOUR_USD = 3600.0  # a dollar a second
LONG, SHORT = 4_000_000, 10  # bytes of text: seconds, and microseconds


class Host:
    """Host work of tenants with a ledger, and a clock that stands still."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        tenants = (
            TenantConfig(name="poor", budgets=(Budget(usd=20.0, per="day"),)),
            *(TenantConfig(name=name) for name in ("a", "b", "c", "d")),
        )
        self.registry = CollectorRegistry()
        self.config = Config(state_dir=folder, tenants=tenants, price_per_host_hour_usd=HOUR_USD, **settings)
        metrics, self.tenants = Metrics(self.registry), Tenants(self.config)
        self.ledger = LocalLedger(self.config.ledger)
        self.meter = UsageMeter(self.config, self.tenants, self.ledger, metrics, hour_usd=1.0)
        self.now_s = 0.0
        self.work = HostWork(self.config, self.tenants, metrics, self.meter, lambda: self.now_s)

    def rows(self) -> list[dict[str, Any]]:
        """What the ledger has by tenant, model and outcome."""
        return asyncio.run(self.meter.usage(0.0, 1e12, ("tenant", "model", "outcome"), None))["groups"]  # type: ignore[no-any-return]


@contextmanager
def hosts(folder: Path, **settings: Any) -> Iterator[Host]:
    host = Host(folder, **settings)
    try:
        yield host
    finally:
        host.work.close()
        host.meter.close()
        host.ledger.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with hosts(tmp_path) as made:
        yield made


def record() -> RequestRecord:
    return RequestRecord(Received("id", "http", "embeddings", "POST", 0.0))


def ask(tenant: str = "a", size: int = SHORT, deadline_s: float = 60.0) -> HostAsk:
    return HostAsk(HostKind.TEXT, size, tenant, deadline_s=deadline_s)


def spin(checkpoint: Checkpoint, parts: int = 1) -> str:
    """A few milliseconds of a core for each part."""
    for _ in range(parts):
        checkpoint()
        sum(range(100_000))
    return "read"


def test_what_reading_used_is_measured_and_charged_at_once(host: Host) -> None:
    of = record()
    assert asyncio.run(host.work.run(of, ask(), spin)) == "read"
    assert of.host is not None
    assert of.host.seconds > 1e-4
    assert of.host.usd == pytest.approx(of.host.seconds)  # at a dollar a second
    assert total(host.registry, "host_seconds_total", kind="text", tenant="a") == pytest.approx(of.host.seconds)
    seconds = of.host.seconds
    asyncio.run(host.work.run(of, ask(), spin))
    assert of.host.seconds > seconds + 1e-4  # of both


@pytest.mark.parametrize(
    ("failure", "outcome", "is_charged"),
    [(None, "priced", True), (Kind.TOO_LARGE, "too_large", True), (Kind.INTERNAL, "internal", False)],
)
def test_what_the_device_never_got_has_a_row_of_its_own(
    host: Host, failure: Kind | None, outcome: str, is_charged: bool
) -> None:
    of = record()
    asyncio.run(host.work.run(of, ask(), spin))
    assert of.host is not None
    used_s = of.host.seconds
    if failure is not None:
        of.fail(failure)
    host.work.charge_unanswered(of)
    host.work.charge_unanswered(of)  # a second time changes nothing
    (row,) = host.rows()
    assert (row["tenant"], row["outcome"], row["requests"], row["device_s"]) == ("a", outcome, 1, 0.0)
    assert row["host_s"] == pytest.approx(used_s)
    assert row["cost_usd"] == row["host_usd"] == pytest.approx(used_s)
    assert row["charged_usd"] == pytest.approx(used_s if is_charged else 0.0)


def test_an_accepted_request_has_no_second_row(host: Host) -> None:
    of = record()
    asyncio.run(host.work.run(of, ask(), spin))
    of.admitted_s = 1.0
    host.work.charge_unanswered(of)
    assert host.rows() == []


def test_a_tenant_over_its_budget_is_refused_before_anything_is_read(host: Host) -> None:
    def never(_: Checkpoint) -> None:
        raise AssertionError("it was read")

    dear = ask("poor", 40_000_000, 600.0)  # a minute: more than the budget holds
    with pytest.raises(FarsightError, match="capacity of budget") as refused:
        asyncio.run(host.work.run(record(), dear, never))
    assert refused.value.kind is Kind.TOO_LARGE

    async def spend() -> None:
        for _ in range(10):
            await host.work.run(record(), ask("poor", LONG), spin)
            host.meter.settle_host(await host.meter.reserve_host(host.tenants.named("poor"), 6.0), 6.0)

    with pytest.raises(FarsightError) as over:
        asyncio.run(spend())
    assert over.value.kind is Kind.OVER_BUDGET
    assert over.value.retry_after_s is not None
    assert over.value.retry_after_s > 0


def test_work_that_cannot_be_done_in_time_or_is_too_much_is_refused_with_numbers(host: Host) -> None:
    with pytest.raises(FarsightError, match=r"predicted to need .* s to read its inputs, over the 1 s left") as late:
        asyncio.run(host.work.run(record(), ask(size=LONG, deadline_s=1.0), spin))
    assert (late.value.kind, late.value.code) == (Kind.DEADLINE, "predicted_late")

    async def too_many() -> None:
        held = threading.Event()
        try:
            await asyncio.gather(*(host.work.run(record(), ask(size=LONG), waiting(held)) for _ in range(9)))
        finally:
            held.set()

    with pytest.raises(FarsightError, match=r"are queued; .* more are over the limit of 30 s") as full:
        asyncio.run(too_many())
    assert full.value.kind is Kind.OVERLOADED


async def left(task: asyncio.Future[Any]) -> None:
    """Its caller leaves."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def waiting(until: threading.Event) -> Callable[[Checkpoint], None]:
    def work(checkpoint: Checkpoint) -> None:
        while not until.wait(0.001):
            checkpoint()

    return work


def test_a_caller_who_leaves_ends_its_work_at_the_next_checkpoint_and_pays_for_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(checkpoint: Checkpoint) -> None:
        begun.set()
        try:
            while True:
                spin(checkpoint)
        finally:
            ended.set()

    async def leave() -> None:
        of = record()
        task = asyncio.ensure_future(host.work.run(of, ask(), work))
        await asyncio.to_thread(begun.wait, 10)
        await left(task)
        of.fail(Kind.CANCELLED)
        host.work.charge_unanswered(of)
        assert await asyncio.to_thread(ended.wait, 10)
        async with asyncio.timeout(10):
            await settled.wait()

    settled, settle = asyncio.Event(), host.meter.settle_unaccepted

    def and_note(*arguments: Any) -> None:
        settle(*arguments)
        settled.set()

    monkeypatch.setattr(host.meter, "settle_unaccepted", and_note)
    asyncio.run(leave())
    (row,) = host.rows()
    assert (row["outcome"], row["tenant"]) == ("cancelled", "a")
    assert row["host_s"] > 0


def test_a_deadline_ends_what_waits_and_what_runs(host: Host) -> None:
    begun, held = threading.Event(), threading.Event()

    def work(checkpoint: Checkpoint) -> None:
        begun.set()
        waiting(held)(checkpoint)

    async def late() -> None:
        deadline = HostAsk(HostKind.TEXT, SHORT, "a", deadline_s=0.05)
        with pytest.raises(FarsightError, match="not finished in time") as ended:
            await host.work.run(record(), deadline, work)
        assert ended.value.kind is Kind.DEADLINE

    asyncio.run(late())
    assert begun.is_set()
    assert not held.is_set()  # it ended at a checkpoint


def test_long_work_pauses_for_other_tenants_and_finishes(host: Host) -> None:
    """Four tenants' long work on three slots: nothing waits for the end of another."""
    order: list[str] = []
    all_begun = threading.Event()

    def work(name: str) -> Callable[[Checkpoint], str]:
        def run(checkpoint: Checkpoint) -> str:
            order.append(name)
            if len(order) == 4:
                all_begun.set()
            while not all_begun.is_set():  # only if those that run let the fourth begin
                spin(checkpoint)
            return name

        return run

    async def all_four() -> list[str]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*(host.work.run(record(), ask(name, LONG), work(name)) for name in "abcd"))

    assert asyncio.run(all_four()) == list("abcd")
    assert sorted(order) == list("abcd")


def test_an_error_of_the_work_reaches_its_caller(host: Host) -> None:
    def broken(_: Checkpoint) -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        asyncio.run(host.work.run(record(), ask(), broken))
    assert asyncio.run(host.work.run(record(), ask(), spin)) == "read"


def test_writing_an_answer_is_neither_refused_nor_charged(host: Host) -> None:
    of = record()
    written = HostAsk(HostKind.RENDER, 10**12, "poor")
    assert asyncio.run(host.work.run(of, written, spin)) == "read"
    assert of.host is None
    assert total(host.registry, "host_seconds_total", kind="render", tenant="poor") > 0


def test_closing_ends_what_runs_pauses_and_waits_and_settles_it(tmp_path: Path) -> None:
    """Also while the work of one tenant is about to pause for another's."""
    host, begun = Host(tmp_path), threading.Semaphore(0)

    def long(checkpoint: Checkpoint) -> None:
        begun.release()
        while True:
            spin(checkpoint)

    async def then_close() -> list[object]:
        works = [asyncio.ensure_future(host.work.run(record(), ask(name, LONG), long)) for name in "abcd" * 2]
        for _ in range(2):
            await asyncio.to_thread(begun.acquire, timeout=10)
        host.work.close()
        async with asyncio.timeout(10):
            return await asyncio.gather(*works, return_exceptions=True)

    failures = asyncio.run(then_close())
    assert {error.kind for error in failures if isinstance(error, FarsightError)} == {Kind.UNAVAILABLE}
    assert len(failures) == 8
    assert total(host.registry, "host_seconds_total", kind="text", tenant="a") > 0
    with pytest.raises(FarsightError, match="does not respond"):
        asyncio.run(host.work.run(record(), ask(), spin))
    host.meter.close()
    host.ledger.close()


def test_a_caller_who_leaves_paused_work_frees_its_place_at_once(host: Host) -> None:
    paused, held = threading.Event(), threading.Event()

    def first(checkpoint: Checkpoint) -> None:
        while True:
            spin(checkpoint)

    def others(checkpoint: Checkpoint) -> None:
        paused.set()
        held.wait(10)

    async def leave() -> None:
        task = asyncio.ensure_future(host.work.run(record(), ask("a", LONG), first))
        await asyncio.sleep(0)
        blocking = [asyncio.ensure_future(host.work.run(record(), ask(name, LONG), others)) for name in "bcd"]
        assert await asyncio.to_thread(paused.wait, 10)
        async with asyncio.timeout(10):
            while not host.work.queue.paused:  # noqa: ASYNC110 (nothing signals it)
                await asyncio.sleep(0.001)
        await left(task)
        assert host.work.queue.paused == 0
        assert host.work.queue.ahead_s("a") == 0
        held.set()
        await asyncio.gather(*blocking)

    asyncio.run(leave())


def test_work_that_was_predicted_too_short_gives_way_like_long_work(host: Host) -> None:
    slots, others_begun = 8, threading.Event()

    def endless(checkpoint: Checkpoint) -> None:
        while not others_begun.is_set():
            spin(checkpoint)

    def other(_: Checkpoint) -> None:
        others_begun.set()

    async def all_of_them() -> None:
        async with asyncio.timeout(30):
            loud = [asyncio.ensure_future(host.work.run(record(), ask("a", SHORT), endless)) for _ in range(slots)]
            await asyncio.sleep(0)
            await host.work.run(record(), ask("b", SHORT), other)
            await asyncio.gather(*loud)

    asyncio.run(all_of_them())


def test_what_one_kind_of_work_taught_does_not_change_another(host: Host) -> None:
    cost, image = host.work._cost, HostAsk(HostKind.IMAGE, 12_000_000, "a")
    before_s = cost.predicted_s(image)
    for _ in range(200):
        cost.learn(HostAsk(HostKind.RENDER, 12, "a"), 0.001)
    assert cost.predicted_s(image) == before_s


def test_prices_are_known_without_the_ledger(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise LedgerError("no connection")

    monkeypatch.setattr(host.ledger, "lease", away)
    with pytest.raises(FarsightError) as refused:
        asyncio.run(host.work.run(record(), ask("poor"), spin))
    assert refused.value.kind is Kind.UNAVAILABLE
    of = record()
    of.is_dry_run = True
    assert asyncio.run(host.work.run(of, ask("poor"), spin)) == "read"


def test_one_request_has_one_row_although_its_reading_ended_later(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[object] = []
    monkeypatch.setattr(host.meter, "settle_unaccepted", lambda *row: rows.append(row))
    begun, held = threading.Event(), threading.Event()

    def work(_: Checkpoint) -> None:
        begun.set()
        held.wait(10)

    async def late() -> None:
        of = record()
        await host.work.run(of, ask(), spin)
        task = asyncio.ensure_future(host.work.run(of, ask(), work))
        await asyncio.to_thread(begun.wait, 10)
        await left(task)
        of.fail(Kind.CANCELLED)
        host.work.charge_unanswered(of)
        assert not rows
        held.set()
        async with asyncio.timeout(10):
            while not rows:  # noqa: ASYNC110 (nothing signals it)
                await asyncio.sleep(0.001)

    asyncio.run(late())
    assert len(rows) == 1
