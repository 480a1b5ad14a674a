"""What was accepted is in the ledger once, whoever is killed and whenever."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.billing.ledger import Ledger, LedgerError, LocalLedger
from service.billing.row import CapacityRow
from service.billing.write_ahead_log import WriteAheadLog, adopt
from tests.billing.common import Clock, bank_at, ledger_row


class Failing(LocalLedger):
    """Does what it is asked and then, for a few calls, fails to say so."""

    failures = 0

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        super().record(requests, capacity)
        if self.failures:
            self.failures -= 1
            raise LedgerError("the answer was lost")


def outcomes(bank: Ledger) -> dict[str, int]:
    return {one["outcome"]: one["requests"] for one in bank.usage(0, 1e12, ("outcome",), None)["groups"]}


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_what_is_settled_is_shipped_and_its_files_go(tmp_path: Path) -> None:
    bank, journal = bank_at(tmp_path, Clock()), WriteAheadLog(tmp_path / "j")
    numbers = [journal.accepted(ledger_row()) for _ in range(5000)]
    for number in numbers[:-1]:
        journal.settled(number, ledger_row())
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 4999}
    assert files(tmp_path / "j") == [".jsonl", ".jsonl", ".lock"]  # one with a request that still runs
    journal.capacity(CapacityRow(at_s=1.0, used_s=1.0, idle_s=2.0, usd=3.0))
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 4999}
    journal.settled(numbers[-1], ledger_row(outcome="deadline"))
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 4999, "deadline": 1}
    assert bank.usage(0, 1e12, (), None)["capacity"] == {"used_s": 1.0, "idle_s": 2.0, "usd": 3.0}
    assert files(tmp_path / "j") == [".jsonl", ".lock"]
    journal.close(bank)
    assert files(tmp_path / "j") == []


def test_a_bank_whose_answers_get_lost_has_nothing_twice(tmp_path: Path) -> None:
    bank, journal = Failing(f"sqlite:///{tmp_path}/ledger.sqlite"), WriteAheadLog(tmp_path / "j")
    for _ in range(10):
        journal.settled(journal.accepted(ledger_row()), ledger_row())
    bank.failures = 2
    for _ in range(2):
        with pytest.raises(LedgerError):
            journal.ship(bank)
        journal.settled(journal.accepted(ledger_row()), ledger_row())
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 12}


def test_a_living_replica_is_not_adopted_and_a_dead_one_once(tmp_path: Path) -> None:
    bank, directory = bank_at(tmp_path, Clock()), tmp_path / "j"
    journal = WriteAheadLog(directory)
    first, second, _ = (journal.accepted(ledger_row(outcome="lost", cost_usd=0.0)) for _ in range(3))
    journal.settled(first, ledger_row())
    journal.ship(bank)
    journal.settled(second, ledger_row())
    assert adopt(directory, bank) == 0
    os.close(journal._lock)  # as when its process dies
    assert adopt(directory, bank) == 1
    assert adopt(directory, bank) == 0
    assert outcomes(bank) == {"ok": 2, "lost": 1}
    assert files(directory) == []


def test_a_line_cut_short_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bank, directory = bank_at(tmp_path, Clock()), tmp_path / "j"
    journal = WriteAheadLog(directory)
    for _ in range(3):
        journal.settled(journal.accepted(ledger_row(outcome="lost")), ledger_row())
    path = next(directory.glob("*.jsonl"))
    written = path.read_bytes().rstrip(b"\0")
    path.write_bytes(written[:-20] + bytes(20))
    os.close(journal._lock)
    assert adopt(directory, bank) == 1
    assert outcomes(bank) == {"ok": 2, "lost": 1}
    assert "cannot be read" in caplog.text


def test_a_row_that_the_database_refuses_keeps_no_other_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bank, journal = bank_at(tmp_path, Clock()), WriteAheadLog(tmp_path / "j")
    for predicted_s in (1.0, float("inf"), 2.0):
        journal.settled(journal.accepted(ledger_row()), ledger_row(predicted_s=predicted_s))
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 2}
    assert "refuses a row" in caplog.text
    assert journal.pending == 0


def test_a_file_that_was_removed_keeps_no_other_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bank, directory = Failing(f"sqlite:///{tmp_path}/ledger.sqlite"), tmp_path / "j"
    journal = WriteAheadLog(directory)
    bank.failures = 1
    journal.settled(journal.accepted(ledger_row()), ledger_row())
    with pytest.raises(LedgerError):
        journal.ship(bank)
    min(directory.glob("*.jsonl")).unlink()
    journal.settled(journal.accepted(ledger_row()), ledger_row())
    journal.ship(bank)
    assert outcomes(bank) == {"ok": 2}  # the bank had the first already
    assert "is gone" in caplog.text


def test_a_lock_that_was_removed_before_it_was_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica that looks for the dead meets ours between its making and its locking."""
    lock, is_first = fcntl.flock, True

    def late(file: int, how: int) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            next(tmp_path.glob("*.lock")).unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    journal = WriteAheadLog(tmp_path)
    monkeypatch.undo()
    journal.accepted(ledger_row())
    assert adopt(tmp_path, bank_at(tmp_path, Clock())) == 0
    assert (tmp_path / f"{journal.id}.lock").exists()


@pytest.mark.parametrize("shipped", [False, True])
def test_kill_9_loses_and_doubles_nothing(tmp_path: Path, shipped: bool) -> None:
    """Killed in the middle of writing; what it had told to be written is in the ledger, exactly once."""
    bank, directory = bank_at(tmp_path, Clock()), tmp_path / "j"
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.billing.log_writer", str(directory)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    accepted, settled = set(), set()
    for writer in writers:
        assert writer.stdout is not None
        journal = writer.stdout.readline().strip()
        for _ in range(500):
            kind, number = writer.stdout.readline().split()
            (accepted if kind == "a" else settled).add((journal, int(number)))
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:
            if line.endswith("\n"):
                kind, number = line.split()
                (accepted if kind == "a" else settled).add((journal, int(number)))
        writer.communicate()
        if shipped:  # adopted by the first, again by whoever comes
            adopt(directory, bank)
    adopt(directory, bank)
    with bank._transaction() as connection:
        found = connection.exec_driver_sql("select journal, number, outcome from requests").all()
    keys = [(one.journal, one.number) for one in found]
    assert len(set(keys)) == len(keys)
    assert accepted <= set(keys)
    done = {(one.journal, one.number) for one in found if one.outcome == "ok"}
    assert settled <= done
    # written down, and killed before it could tell
    assert len(set(keys) - accepted) <= 2
    assert len(done - settled) <= 2
    assert not list(directory.iterdir())
