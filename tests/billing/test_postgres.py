"""The ledger on a real PostgreSQL: dialects differ in conflicts, locks and arithmetic."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa

from service.billing.ledger import LedgerError, LocalLedger
from service.billing.tables import roll_up
from service.config import Budget
from tests.billing.common import Clock, row

INITDB = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
MINUTE = Budget(usd=60, per="minute")

pytestmark = pytest.mark.skipif(INITDB is None, reason="no PostgreSQL server is installed")


def _as_nobody(*command: str) -> None:
    """PostgreSQL refuses to run as root."""
    prefix = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    subprocess.run([*prefix, *command], check=True, capture_output=True, cwd="/")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A database server of its own, on a socket only."""
    assert INITDB is not None
    directory = Path(tempfile.mkdtemp(prefix="farsight-pg-", dir="/tmp"))  # a socket's path is short
    if os.geteuid() == 0:
        shutil.chown(directory, "nobody")
    data, control = str(directory / "data"), str(Path(INITDB).with_name("pg_ctl"))
    options = f"-c listen_addresses='' -c unix_socket_directories={directory} -c fsync=off"
    try:
        _as_nobody(INITDB, "-D", data, "-U", "farsight", "--auth=trust", "--no-sync")
        _as_nobody(control, "-D", data, "-w", "-l", str(directory / "log"), "-o", options, "start")
        yield f"postgresql+psycopg://farsight@/postgres?host={directory}"
        _as_nobody(control, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def url(server: str) -> str:
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.exec_driver_sql("drop schema public cascade; create schema public")
    engine.dispose()
    return server


def test_budgets_and_ledger(url: str) -> None:
    clock = Clock()
    ledger = LocalLedger(url, 2, clock)
    assert ledger.lease("a", MINUTE, 50, 50).amount == 50
    assert ledger.lease("a", MINUTE, 25, 30).refill_s == pytest.approx(15)
    ledger.give_back("a", MINUTE, 20)
    clock.now_s += 5
    ledger.close()
    ledger = LocalLedger(url, 2, clock)  # a new one on the same database, as after a crash
    assert ledger.lease("a", MINUTE, 1, 100).amount == pytest.approx(35)

    rows = [
        row(journal="j", number=index, at_s=600_000.0 + 97 * index, joules=index % 2 or None) for index in range(500)
    ]
    ledger.record(rows, [{"journal": "j", "number": 999, "at_s": 600_000.0, "used_s": 6.0, "idle_s": 4.0, "usd": 1.0}])
    ledger.record(rows[:100], [])
    before = ledger.usage(0, 2e6, ("tenant", "hour"), None)
    assert sum(group["requests"] for group in before["groups"]) == 500
    for before_s in (610_000.0, 640_000.0, 1e6):
        with ledger._transaction() as connection:
            roll_up(connection, before_s)
    after = ledger.usage(0, 2e6, ("tenant", "hour"), None)
    assert len(after["groups"]) == len(before["groups"])
    for group, other in zip(before["groups"], after["groups"], strict=True):
        assert other == pytest.approx(group)
    assert orjson.loads(orjson.dumps(after)) == after  # no decimals: JSON cannot hold them
    assert after["capacity"] == before["capacity"] == {"used_s": 6.0, "idle_s": 4.0, "usd": 1.0}
    assert ledger.sample_requests(0, 2e6, 10) == []
    with pytest.raises(LedgerError, match="null value"):
        ledger.record([row(journal="j", number=1001, tenant=None)], [])
    ledger.close()


def test_concurrent_ledgers_never_grant_more_than_the_budget(url: str) -> None:
    """Two services on one database, each with threads: rows are locked while they change."""
    clock = Clock()
    ledgers = [LocalLedger(url, 30, clock) for _ in range(2)]

    def ask(index: int) -> float:
        return sum(ledgers[index % 2].lease("new", MINUTE, 0.5, 0.7).amount for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        granted = sum(pool.map(ask, range(8)))
    assert granted == pytest.approx(60, abs=0.5)
    for ledger in ledgers:
        ledger.close()
