"""A ledger whose file is deleted, replaced or read-only under it: noticed at the next use, and made anew."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.billing.database import Database
from service.billing.ledger import LedgerError, LocalLedger
from service.billing.write_ahead_log import WriteAheadLog
from service.config import Budget
from tests.billing.common import Clock, ledger_at, ledger_row, row
from tests.billing.test_write_ahead_log import outcomes

DAY = Budget(usd=10, per="day")
MODES = {"", "-wal", "-shm"}


def delete_all(directory: Path) -> None:
    for path in directory.glob("ledger.sqlite*"):
        path.unlink()


def delete_file(directory: Path) -> None:
    (directory / "ledger.sqlite").unlink()


def replace(directory: Path) -> None:
    other = ledger_at(directory / "other", Clock())
    other.usage(0, 1, (), None)
    other.close()
    (directory / "other" / "ledger.sqlite").replace(directory / "ledger.sqlite")


LOSSES = pytest.mark.parametrize("lose", [delete_all, delete_file, replace, shutil.rmtree])


@LOSSES
def test_a_lost_file_is_made_anew_at_the_next_write(
    tmp_path: Path, lose: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "state"
    ledger, log = ledger_at(directory, Clock()), WriteAheadLog(tmp_path / "j")
    log.settled(log.accepted(ledger_row()), ledger_row())
    log.ship(ledger)
    log.settled(log.accepted(ledger_row()), ledger_row())
    lose(directory)
    previous = os.umask(0o022)
    with pytest.raises(LedgerError, match="deleted or replaced"):  # once, so that it is counted
        log.ship(ledger)
    os.umask(previous)
    log.ship(ledger)
    assert outcomes(ledger) == {"ok": 1}  # that was not shipped; the other was in the lost file only
    with sqlite3.connect(directory / "ledger.sqlite") as database:
        assert database.execute("select count(*) from requests").fetchone() == (1,)
    assert [record.levelno for record in caplog.records if "deleted or replaced" in record.message] == [logging.ERROR]
    if lose is not replace:
        found = {path.name.removeprefix("ledger.sqlite"): path.stat().st_mode for path in directory.iterdir()}
        assert {name for name in found if ".lost-" not in name} == MODES
        assert not any(mode & 0o077 for mode in found.values())


@LOSSES
def test_a_lost_file_is_made_anew_at_the_next_read(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    directory = tmp_path / "state"
    ledger = ledger_at(directory, Clock())
    ledger.record([row(number=1)], [])
    lose(directory)
    assert outcomes(ledger) == {}


@LOSSES
def test_what_is_leased_stays_leased(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    directory, clock = tmp_path / "state", Clock()
    ledger = ledger_at(directory, clock)
    assert ledger.lease("a", DAY, 4, 4).amount == 4
    lose(directory)
    assert ledger.lease("a", DAY, 7, 7).amount == 0
    clock.now_s += 8640  # a tenth of a day
    assert ledger.lease("a", DAY, 7, 7).amount == pytest.approx(7)
    lose(directory)
    ledger.give_back("a", DAY, 5)
    lose(directory)
    assert ledger.lease("a", DAY, 5, 10).amount == pytest.approx(5)


def test_a_file_that_was_moved_away_keeps_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger, moved = ledger_at(tmp_path, Clock()), tmp_path / "old.sqlite"
    rows = [row(number=number) for number in range(50)]
    ledger.record(rows, [])
    for _ in range(2):  # within the same second
        (tmp_path / "ledger.sqlite").rename(moved)
        with pytest.raises(LedgerError, match="deleted or replaced"):
            ledger.record(rows, [])
    kept = sorted(tmp_path.glob("ledger.sqlite-wal.lost-*"))
    assert len(kept) == 2
    assert [str(path) in record.message for path, record in zip(kept, caplog.records, strict=True)] == [True, True]
    assert not any(path.stat().st_mode & 0o077 for path in kept)
    kept[1].rename(tmp_path / "old.sqlite-wal")
    with sqlite3.connect(moved) as database:
        assert database.execute("select count(*) from requests").fetchone() == (50,)


def test_an_error_of_one_thread_is_not_forgotten_by_a_full_disk_of_another(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/ledger.sqlite")
    failed, full = sqlite3.OperationalError(), sqlite3.OperationalError()
    full.sqlite_errorname = "SQLITE_FULL"
    with suppress(sa.exc.OperationalError), database.begin(is_read_only=True):
        with suppress(sa.exc.OperationalError), database.begin(is_read_only=True):
            raise sa.exc.OperationalError("", None, failed)
        raise sa.exc.OperationalError("", None, full)
    assert database._is_suspect, "opened anew at the next use"
    database.close()


def lose_while_writing(ledger: LocalLedger, directory: Path) -> None:
    with ledger._transaction() as connection:
        connection.exec_driver_sql("delete from requests")
        delete_file(directory)


def test_a_write_into_a_file_that_is_lost_meanwhile_is_an_error(tmp_path: Path) -> None:
    """It is committed there only, so its caller must send it again."""
    ledger = ledger_at(tmp_path, Clock())
    ledger.record([row(number=1)], [])
    with pytest.raises(LedgerError, match="during a transaction"):
        lose_while_writing(ledger, tmp_path)
    with pytest.raises(LedgerError, match="only the old file"):
        ledger.record([row(number=1)], [])
    ledger.record([row(number=2)], [])
    assert outcomes(ledger) == {"ok": 2}


def test_nothing_is_lost_if_only_the_log_of_sqlite_is_deleted(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, Clock())
    ledger.record([row(number=number) for number in range(50)], [])
    (tmp_path / "ledger.sqlite-wal").unlink()
    assert outcomes(ledger) == {"ok": 50}
    ledger.close()
    assert outcomes(ledger_at(tmp_path, Clock())) == {"ok": 50}


def test_threads_that_use_a_file_while_it_is_lost_go_on_with_the_new_one(tmp_path: Path) -> None:
    """Every call ends with an answer or a LedgerError; what was recorded after the last loss is there."""
    ledger, stopped = ledger_at(tmp_path, Clock()), threading.Event()
    kept: list[int] = []

    def read() -> None:
        while not stopped.is_set():
            with suppress(LedgerError):
                ledger.usage(0, 1e12, ("tenant",), None)

    threads = ThreadPoolExecutor(2)
    readers = [threads.submit(read) for _ in range(2)]
    for number in range(100):
        if number % 20 == 10:
            delete_file(tmp_path)
            kept.clear()
        for _ in range(5):
            with suppress(LedgerError):
                ledger.record([row(number=number)], [])
        kept.append(number)
    stopped.set()
    for reader in readers:
        reader.result()
    threads.shutdown()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        found = {number for (number,) in database.execute("select number from requests")}
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert set(kept) == found


# as a user whom permissions bind: prints what happens while the file may not be written, and afterwards
READ_ONLY = """
import os, sys
from contextlib import suppress
from service.billing.ledger import LedgerError
from tests.billing.common import Clock, Path, ledger_at, row
directory = Path(sys.argv[1])
ledger_at(directory / "first", Clock()).usage(0, 1, (), None)  # imports the rest
if os.geteuid() == 0:
    os.chown(directory, 65534, 65534)
    os.setuid(65534)
ledger = ledger_at(directory, Clock())
ledger.record([row(number=1)], [])
ledger.close()
os.chmod(directory / "ledger.sqlite", 0o400)
for _ in range(2):
    try:
        ledger.record([row(number=2)], [])
    except LedgerError as error:
        print(error)
print(ledger.usage(0, 1e12, (), None)["groups"][0]["requests"])
os.chmod(directory / "ledger.sqlite", 0o600)
with suppress(LedgerError):
    ledger.record([row(number=2)], [])  # on a connection that was opened to read
ledger.record([row(number=2)], [])
print(ledger.usage(0, 1e12, (), None)["groups"][0]["requests"])
"""


def test_a_file_that_was_read_only_is_written_once_it_may_be() -> None:
    with tempfile.TemporaryDirectory() as directory:  # that of pytest is its owner's alone
        code = [sys.executable, "-c", READ_ONLY, directory]
        ran = subprocess.run(code, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *refused, during, after = ran.stdout.splitlines()
    assert ["readonly" in line for line in refused] == [True, True], ran.stdout
    assert (during, after) == ("1", "2")
