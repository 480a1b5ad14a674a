"""The write-ahead log and the ledger on a disk that is really full: nothing accepted is lost, and both go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.billing import tables
from service.billing.ledger import LedgerError
from service.billing.row import CapacityRow
from service.billing.write_ahead_log import ROW_BYTES, SEGMENT_BYTES, WriteAheadLog, recover
from service.config import Budget
from tests.billing.common import Clock, ledger_at, ledger_row
from tests.billing.test_write_ahead_log import files, outcomes
from tests.disks import Disk, disk

__all__ = ["disk"]

FULL = "No space left"


def repeat(call: Callable[[], object]) -> None:
    for _ in range(100_000):
        call()


def until_full(call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=FULL):
        repeat(call)


def test_what_was_accepted_can_be_settled_on_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    ledger, log = ledger_at(tmp_path, Clock()), WriteAheadLog(disk.root / "j")
    numbers = [log.accepted(ledger_row()) for _ in range(2000)]  # their settlements need three files
    disk.fill()
    until_full(lambda: numbers.append(log.accepted(ledger_row())))
    until_full(lambda: log.capacity(CapacityRow(at_s=1.0, used_s=1.0, idle_s=1.0, usd=1.0)))
    until_full(lambda: log.unaccepted(ledger_row(outcome="priced")))  # takes no room of a settlement
    for number in numbers[:-1]:
        log.settled(number, ledger_row())
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": len(numbers) - 1}
    disk.free()
    log.settled(numbers[-1], ledger_row())
    log.close(ledger)
    assert outcomes(ledger) == {"ok": len(numbers)}
    assert files(disk.root / "j") == []


def test_closed_files_are_shipped_from_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    """Which makes room, so that the log goes on by itself."""
    ledger, log = ledger_at(tmp_path, Clock()), WriteAheadLog(disk.root / "j")
    for _ in range(3 * SEGMENT_BYTES // len("x" * 700)):
        log.settled(log.accepted(ledger_row()), ledger_row())
    disk.fill()
    before = len(files(disk.root / "j"))
    log.ship(ledger)
    assert len(files(disk.root / "j")) < before
    log.accepted(ledger_row())


def test_a_log_that_began_on_a_full_disk_goes_on_once_it_has_room(disk: Disk, tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    disk.fill()
    log, unused = WriteAheadLog(disk.root / "j"), WriteAheadLog(disk.root / "k")
    for _ in range(2):
        with pytest.raises(OSError, match=FULL):
            log.accepted(ledger_row())
        log.ship(ledger)
    unused.close(ledger)
    disk.free()
    log.settled(log.accepted(ledger_row()), ledger_row())
    assert recover(disk.root / "j", ledger) == 0  # it has its lock
    log.close(ledger)
    assert outcomes(ledger) == {"ok": 1}


@pytest.mark.parametrize("text", ["x", "\N{ELECTRIC LIGHT BULB}"])
def test_the_longest_settlement_has_room(tmp_path: Path, text: str) -> None:
    """However long the names and numbers of a request are."""
    log = WriteAheadLog(tmp_path)
    names = {name: text * (length if text == "x" else length // 4) for name, length in tables.TEXT_LENGTHS.items()}
    numbers = dict.fromkeys(("device_s", "cost_usd", "predicted_s", "total_s", "flops"), 1.2345678901234567e-100)
    row = ledger_row(**names, **numbers, tokens=2**62)
    before = log._used_bytes
    log.settled(2**62, row)
    assert log._used_bytes - before < ROW_BYTES


def test_a_ledger_on_a_full_disk_is_behind_and_catches_up(disk: Disk, tmp_path: Path) -> None:
    ledger, log = ledger_at(disk.root, Clock()), WriteAheadLog(tmp_path / "j")
    budget = Budget(usd=10, per="day")
    assert ledger.lease("a", budget, 4, 4).amount == 4
    disk.fill()
    accepted = 0

    def ship() -> None:
        nonlocal accepted
        for _ in range(100):
            log.settled(log.accepted(ledger_row()), ledger_row())
            accepted += 1
        log.ship(ledger)

    with pytest.raises(LedgerError, match="full"):
        repeat(ship)  # until the blocks that SQLite has are used
    assert ledger.lease("a", budget, 0, 0).level == pytest.approx(0.6)
    disk.free()
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": accepted}
    assert ledger.lease("a", budget, 6, 6).amount == 6


def test_a_ledger_is_made_once_a_full_disk_has_room(disk: Disk) -> None:
    ledger = ledger_at(disk.root / "state", Clock())
    disk.fill()
    for _ in range(2):
        with pytest.raises(LedgerError):
            ledger.usage(0, 1, (), None)
    disk.free()
    assert outcomes(ledger) == {}
    mode = os.stat(disk.root / "state" / "ledger.sqlite").st_mode
    assert mode & 0o077 == 0
