"""Accepted requests are recorded exactly once, even if replicas or the ledger crash at any time."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.billing.ledger import Ledger, LedgerError, LocalLedger
from service.billing.row import CapacityRow
from service.billing.write_ahead_log import WriteAheadLog, recover
from tests.billing.common import Clock, ledger_at, ledger_row


class Failing(LocalLedger):
    """Records rows, but raises an error afterwards in the next `failures` calls."""

    failures = 0

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        super().record(requests, capacity)
        if self.failures:
            self.failures -= 1
            raise LedgerError("timed out after recording")


def outcomes(ledger: Ledger) -> dict[str, int]:
    return {group["outcome"]: group["requests"] for group in ledger.usage(0, 1e12, ("outcome",), None)["groups"]}


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_settled_requests_are_shipped_and_their_files_deleted(tmp_path: Path) -> None:
    ledger, log = ledger_at(tmp_path, Clock()), WriteAheadLog(tmp_path / "j")
    numbers = [log.accepted(ledger_row()) for _ in range(5000)]
    for number in numbers[:-1]:
        log.settled(number, ledger_row())
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 4999}
    assert files(tmp_path / "j") == [".jsonl", ".jsonl", ".lock"]  # one .jsonl holds the request that still runs
    log.capacity(CapacityRow(at_s=1.0, used_s=1.0, idle_s=2.0, usd=3.0))
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 4999}
    log.settled(numbers[-1], ledger_row(outcome="deadline"))
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 4999, "deadline": 1}
    assert ledger.usage(0, 1e12, (), None)["capacity"] == {"used_s": 1.0, "idle_s": 2.0, "usd": 3.0}
    assert files(tmp_path / "j") == [".jsonl", ".lock"]
    log.close(ledger)
    assert files(tmp_path / "j") == []


def test_rows_sent_again_after_a_lost_answer_are_recorded_once(tmp_path: Path) -> None:
    ledger, log = Failing(f"sqlite:///{tmp_path}/ledger.sqlite"), WriteAheadLog(tmp_path / "j")
    for _ in range(10):
        log.settled(log.accepted(ledger_row()), ledger_row())
    ledger.failures = 2
    for _ in range(2):
        with pytest.raises(LedgerError):
            log.ship(ledger)
        log.settled(log.accepted(ledger_row()), ledger_row())
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 12}


def test_the_log_of_a_dead_replica_is_recovered_once_and_of_a_living_one_never(tmp_path: Path) -> None:
    ledger, directory = ledger_at(tmp_path, Clock()), tmp_path / "j"
    log = WriteAheadLog(directory)
    first, second, _ = (log.accepted(ledger_row(outcome="lost", cost_usd=0.0)) for _ in range(3))
    log.settled(first, ledger_row())
    log.ship(ledger)
    log.settled(second, ledger_row())
    assert recover(directory, ledger) == 0
    os.close(log._lock)  # as when its process dies
    assert recover(directory, ledger) == 1
    assert recover(directory, ledger) == 0
    assert outcomes(ledger) == {"ok": 2, "lost": 1}
    assert files(directory) == []


def test_a_truncated_line_loses_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger, directory = ledger_at(tmp_path, Clock()), tmp_path / "j"
    log = WriteAheadLog(directory)
    for _ in range(3):
        log.settled(log.accepted(ledger_row(outcome="lost")), ledger_row())
    path = next(directory.glob("*.jsonl"))
    written = path.read_bytes().rstrip(b"\0")
    path.write_bytes(written[:-20] + bytes(20))
    os.close(log._lock)
    assert recover(directory, ledger) == 1
    assert outcomes(ledger) == {"ok": 2, "lost": 1}
    assert "unreadable line" in caplog.text


def test_a_row_that_the_database_rejects_does_not_block_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, log = ledger_at(tmp_path, Clock()), WriteAheadLog(tmp_path / "j")
    for predicted_s in (1.0, float("inf"), 2.0):
        log.settled(log.accepted(ledger_row()), ledger_row(predicted_s=predicted_s))
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 2}
    assert "rejected a row" in caplog.text
    assert log.pending == 0


def test_rows_of_deleted_files_and_of_a_deleted_directory_are_shipped(tmp_path: Path) -> None:
    ledger, directory = Failing(f"sqlite:///{tmp_path}/ledger.sqlite"), tmp_path / "j"
    log = WriteAheadLog(directory)
    ledger.failures = 1
    log.settled(log.accepted(ledger_row()), ledger_row())
    with pytest.raises(LedgerError):
        log.ship(ledger)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("delete from requests")
    min(directory.glob("*.jsonl")).unlink()
    log.settled(log.accepted(ledger_row()), ledger_row())
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 2}
    log.settled(log.accepted(ledger_row()), ledger_row())
    running = log.accepted(ledger_row())
    shutil.rmtree(directory)
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 3}
    assert recover(directory, ledger) == 0  # the new directory has a lock of this log
    log.settled(running, ledger_row())
    log.close(ledger)
    assert outcomes(ledger) == {"ok": 4}
    assert files(directory) == []


def test_no_more_files_are_made_while_the_ledger_is_away_than_the_rows_need(tmp_path: Path) -> None:
    ledger, directory = Failing(f"sqlite:///{tmp_path}/ledger.sqlite"), tmp_path / "j"
    log = WriteAheadLog(directory)
    ledger.failures = 10
    for _ in range(10):
        log.settled(log.accepted(ledger_row()), ledger_row())
        with pytest.raises(LedgerError):
            log.ship(ledger)
    assert files(directory) == [".jsonl", ".jsonl", ".lock"]
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 10}
    log.close(ledger)


def test_a_lock_file_deleted_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica looks for dead ones between creation and locking of our lock file."""
    lock, is_first = fcntl.flock, True

    def late(file: int, how: int) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            next(tmp_path.glob("*.lock")).unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    log = WriteAheadLog(tmp_path)
    monkeypatch.undo()
    log.accepted(ledger_row())
    assert recover(tmp_path, ledger_at(tmp_path, Clock())) == 0
    assert (tmp_path / f"{log.id}.lock").exists()


@pytest.mark.parametrize("shipped", [False, True])
def test_kill_9_loses_and_duplicates_nothing(tmp_path: Path, shipped: bool) -> None:
    """Killed while writing; each line that it had reported as written is in the ledger exactly once."""
    ledger, directory = ledger_at(tmp_path, Clock()), tmp_path / "j"
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.billing.log_writer", str(directory)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    accepted, settled = set(), set()
    for writer in writers:
        assert writer.stdout is not None
        log_id = writer.stdout.readline().strip()
        for _ in range(500):
            kind, number = writer.stdout.readline().split()
            (accepted if kind == "a" else settled).add((log_id, int(number)))
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:
            if line.endswith("\n"):
                kind, number = line.split()
                (accepted if kind == "a" else settled).add((log_id, int(number)))
        writer.communicate()
        if shipped:  # recovered now and again below
            recover(directory, ledger)
    recover(directory, ledger)
    with ledger._transaction() as connection:
        found = connection.exec_driver_sql("select journal, number, outcome from requests").all()
    keys = [(row.journal, row.number) for row in found]
    assert len(set(keys)) == len(keys)
    assert accepted <= set(keys)
    done = {(row.journal, row.number) for row in found if row.outcome == "ok"}
    assert settled <= done
    # logged, and killed before it could report it
    assert len(set(keys) - accepted) <= 2
    assert len(done - settled) <= 2
    assert not list(directory.iterdir())
