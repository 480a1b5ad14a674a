"""Budgets refill, rows are recorded exactly once, and sums stay the same when rows are rolled up."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from service.billing.ledger import LedgerError, LocalLedger
from service.billing.tables import ADDED, roll_up
from service.config import Budget
from tests.billing.common import Clock, ledger_at, row

MINUTE = Budget(usd=60, per="minute")  # one a second
BURST = Budget(device_s=60, per="minute", burst=5)


def test_a_budget_is_full_at_first_and_refills_evenly(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock)
    assert ledger.lease("a", MINUTE, 50, 50).amount == 50
    refused = ledger.lease("a", MINUTE, 25, 30)
    assert (refused.amount, refused.refill_s) == (0, pytest.approx(15))
    assert refused.level == pytest.approx(10 / 60)
    clock.now_s += 15
    assert ledger.lease("a", MINUTE, 25, 30).amount == pytest.approx(25)  # as much as is left
    clock.now_s += 1e6
    assert ledger.lease("a", MINUTE, 1, 1e9).amount == 60  # never more than its capacity


def test_a_burst_is_less_than_the_amount(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    assert ledger.lease("a", BURST, 1, 100).amount == 5
    assert ledger.lease("a", BURST, 2, 2).refill_s == pytest.approx(2)


def test_tenants_and_budgets_are_independent(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    ledger.lease("a", MINUTE, 60, 60)
    assert ledger.lease("b", MINUTE, 60, 60).amount == 60
    assert ledger.lease("a", Budget(usd=10, per="day"), 10, 10).amount == 10


def test_returned_amounts_can_be_leased_again_and_debts_are_charged(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    ledger.lease("a", MINUTE, 60, 60)
    ledger.give_back("a", MINUTE, 20)
    ledger.give_back("a", MINUTE, -5)
    assert ledger.lease("a", MINUTE, 1, 60).amount == pytest.approx(15)
    ledger.give_back("a", MINUTE, 1e9)
    assert ledger.lease("a", MINUTE, 1, 1e9).amount == 60


def test_a_ledger_that_crashes_keeps_its_state(tmp_path: Path) -> None:
    clock = Clock()
    ledger_at(tmp_path, clock).lease("a", MINUTE, 60, 60)  # never closed
    assert ledger_at(tmp_path, clock).lease("a", MINUTE, 1, 1).amount == 0


def test_a_row_sent_twice_is_recorded_once(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    rows = [row(journal="j", number=number) for number in range(10)]
    stretch = {"journal": "j", "number": 11, "at_s": 1_000_000.0, "used_s": 6.0, "idle_s": 4.0, "usd": 1.0}
    ledger.record(rows, [stretch])
    ledger.record([*rows[5:], row(journal="j", number=10)], [stretch])
    found = ledger.usage(0, 2e6, (), None)
    assert found["groups"][0]["requests"] == 11
    assert found["groups"][0]["cost_usd"] == pytest.approx(5.5)
    assert found["capacity"] == {"used_s": 6.0, "idle_s": 4.0, "usd": 1.0}


def test_usage_by_any_group_within_a_period(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    given = [("a", "dense", 0), ("a", "sparse", 0), ("b", "dense", 3600), ("b", "dense", 90_000)]
    rows = [
        row(journal="j", number=number, tenant=tenant, plan=plan, at_s=864_000.0 + at_s)
        for number, (tenant, plan, at_s) in enumerate(given)
    ]
    ledger.record(rows, [])

    def counts(
        *group_by: str, from_s: float = 0.0, to_s: float = 1e9, tenant: str | None = None
    ) -> list[tuple[object, ...]]:
        found = ledger.usage(from_s, to_s, group_by, tenant)["groups"]
        return [(*(group[name] for name in group_by), group["requests"]) for group in found]

    assert counts("tenant") == [("a", 2), ("b", 2)]
    assert counts("plan", tenant="a") == [("dense", 1), ("sparse", 1)]
    assert counts("hour", tenant="b") == [(867_600, 1), (954_000, 1)]
    assert counts("day") == [(864_000, 3), (950_400, 1)]
    assert counts(from_s=864_000.0, to_s=867_600.0) == [(2,)]
    assert counts("tenant", from_s=1e8) == []


def test_old_requests_are_rolled_up_by_hour_with_equal_sums(tmp_path: Path) -> None:
    clock = Clock(1_000_000.0)
    ledger = ledger_at(tmp_path, clock, keep_days=2)
    rows = [
        row(
            journal="j",
            number=number,
            at_s=600_000.0 + 97.0 * number,
            tenant="ab"[number % 2],
            joules=number % 3 or None,
        )
        for number in range(5000)
    ]
    capacity = [
        {
            "journal": "j",
            "number": 10_000 + index,
            "at_s": 600_000.0 + 60.0 * index,
            "used_s": 1.0,
            "idle_s": 59.0,
            "usd": 0.1,
        }
        for index in range(8000)
    ]
    ledger.record(rows, capacity)
    before = [ledger.usage(0, 2e6, group_by, None) for group_by in (("tenant",), ("day", "plan"), ("hour",))]
    clock.now_s += 3601
    late = row(journal="late", number=1, at_s=600_001.0, tenant="a", joules=5.0)
    ledger.record([], [])  # rolls up rows older than two days
    ledger.record([late], [])
    clock.now_s += 3601
    ledger.record([], [])  # and rows of such hours that arrived since
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        kept, summed = (
            database.execute(f"select count(*) from {name}").fetchone()[0] for name in ("requests", "hours")
        )
        oldest = database.execute("select min(at_s) from requests").fetchone()[0]
    assert kept + summed < 3000
    assert oldest >= clock.now_s - 2 * 86_400 - 3600
    after = [ledger.usage(0, 2e6, group_by, None) for group_by in (("tenant",), ("day", "plan"), ("hour",))]
    assert after[0]["groups"][0]["requests"] == before[0]["groups"][0]["requests"] + 1
    assert after[0]["groups"][0]["joules"] == pytest.approx(before[0]["groups"][0]["joules"] + 5)
    assert after[0]["groups"][1] == pytest.approx(before[0]["groups"][1])
    for was, now in zip(before, after, strict=True):
        assert now["capacity"] == pytest.approx(was["capacity"])
        assert sum(group["tokens"] for group in now["groups"]) == 10 + sum(group["tokens"] for group in was["groups"])


def test_rolling_up_in_parts_equals_rolling_up_at_once(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    ledger.record([row(journal="j", number=number, at_s=3600.0 * number) for number in range(20)], [])
    for before_s in (7200.0, 36_000.0, 36_000.0, 1e6):
        with ledger._transaction() as connection:
            roll_up(connection, before_s)
    assert [group["requests"] for group in ledger.usage(0, 1e6, ("hour",), None)["groups"]] == [1] * 20


def test_database_errors_do_not_show_rows(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    with pytest.raises(LedgerError) as caught:
        ledger.record([row(journal="j", number=1, tenant=None, request_id="private")], [])
    assert "NOT NULL" in str(caught.value)
    assert "private" not in str(caught.value)
    with pytest.raises(LedgerError, match="cannot be opened"):
        LocalLedger("sqlite:////proc/nowhere/ledger.sqlite").usage(0, 1, (), None)


def test_the_refill_counts_time_once_even_if_clocks_differ(tmp_path: Path) -> None:
    clock, other = Clock(), Clock()
    ledger, behind = ledger_at(tmp_path, clock), ledger_at(tmp_path, other)
    other.now_s -= 0.5
    granted = ledger.lease("a", MINUTE, 60, 60).amount - 60
    for _ in range(60):
        clock.now_s, other.now_s = clock.now_s + 1, other.now_s + 1
        granted += ledger.lease("a", MINUTE, 0, 60).amount + behind.lease("a", MINUTE, 0, 60).amount
    assert granted == pytest.approx(60)


def test_only_its_owner_can_read_the_ledger(tmp_path: Path) -> None:
    ledger_at(tmp_path / "new", Clock()).usage(0, 1, (), None)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "ledger.sqlite").stat().st_mode & 0o077 == 0


def test_a_ledger_of_an_older_version_gets_the_new_columns(tmp_path: Path) -> None:
    """Without losing a row, and rows that an older replica still writes are taken."""
    first = ledger_at(tmp_path, Clock())
    first.record([row(journal="j", number=1)], [])
    first.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        for table in ("requests", "hours"):
            for name in ADDED:
                database.execute(f"alter table {table} drop column {name}")
    ledger = ledger_at(tmp_path, Clock())
    older = {name: value for name, value in row(journal="j", number=2).items() if name not in ADDED}
    ledger.record([older], [])
    ledger.record([row(journal="j", number=3, host_s=2.0, host_usd=0.5)], [])
    (group,) = ledger.usage(0, 1e12, (), None)["groups"]
    assert (group["requests"], group["host_s"], group["host_usd"]) == (3, 2.0, 0.5)
