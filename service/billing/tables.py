"""The tables of the ledger and the budgets, and what is asked of them. SQLite or PostgreSQL, through SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.billing.query import HOUR_S, KEYS, WIDTHS_S
from service.billing.row import CapacityRow, LedgerRow

tables = sa.MetaData()

# of the text columns; a wider value is an error in PostgreSQL
TEXT_LENGTHS = {
    "request_id": 128,
    "tenant": 64,
    "endpoint": 32,
    "model": 96,
    "plan": 16,
    "outcome": 24,
}


def _columns(row: type[LedgerRow] | type[CapacityRow]) -> Iterator[sa.Column[Any]]:
    """Primary key (write-ahead log, line number), which makes inserts idempotent, then the fields of the row."""
    yield sa.Column("journal", sa.String(64), primary_key=True)
    yield sa.Column("number", sa.BigInteger, primary_key=True)
    for name, kind in get_type_hints(row).items():
        is_nullable = kind == float | None
        column_type = sa.String(TEXT_LENGTHS[name]) if kind is str else sa.BigInteger() if kind is int else sa.Float(53)
        yield sa.Column(name, column_type, nullable=is_nullable, index=name == "at_s")


requests = sa.Table("requests", tables, *_columns(LedgerRow))

SUMS = ("tokens", "flops", "flops_dense", "device_s", "joules", "cost_usd", "charged_usd", "saved_usd")

# older requests, an hour of one kind in one row
hours = sa.Table(
    "hours",
    tables,
    sa.Column("at_s", sa.Float(53), primary_key=True),  # its beginning
    *(sa.Column(name, sa.String(96), primary_key=True) for name in KEYS),
    sa.Column("requests", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.Float(53), nullable=name == "joules") for name in SUMS),
)

capacity = sa.Table("capacity", tables, *_columns(CapacityRow))

# what is left of a tenant's budget at one time
budgets = sa.Table(
    "budgets",
    tables,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("budget", sa.String(32), primary_key=True),
    sa.Column("level", sa.Float(53), nullable=False),
    sa.Column("at_s", sa.Float(53), nullable=False),
)

READING = "is_reading"  # execution option of a connection that only looks


def connect(url: str) -> sa.Engine:
    """The database of `url` with its tables."""
    parsed = sa.make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        Path(parsed.database).touch(0o600)
    engine = sa.create_engine(parsed, pool_pre_ping=not is_sqlite)
    if is_sqlite:

        @sa.event.listens_for(engine, "connect")
        def _(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the transactions are ours, below
            # a commit survives the death of any process; the last ones may be lost when the machine itself dies
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA busy_timeout=10000")

        @sa.event.listens_for(engine, "begin")
        def _(connection: sa.Connection) -> None:
            # who will write says so first: a level that was read must not change before it is written
            is_reading = connection.get_execution_options().get(READING, False)
            connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")

    try:
        tables.create_all(engine)
    except sa.exc.DBAPIError:  # somebody else makes them at this moment
        tables.create_all(engine)
    return engine


def add_new(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert those rows that are not there yet."""
    if rows:
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        connection.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))


def fold(connection: sa.Connection, before_s: float) -> None:
    """Requests and capacity of whole hours before that time become sums."""
    until_s = before_s // HOUR_S * HOUR_S
    old = requests.c.at_s < until_s
    hour = _slot(requests.c.at_s, HOUR_S)
    keys = [requests.c[name] for name in KEYS]
    sums = sa.select(hour, *keys, sa.func.count(), *(sa.func.sum(requests.c[name]) for name in SUMS))
    found = connection.execute(sums.where(old).group_by(hour, *keys)).all()
    connection.execute(requests.delete().where(old))
    for row in found:
        key = dict(zip(("at_s", *KEYS), row, strict=False))
        _add(connection, hours, key, dict(zip(("requests", *SUMS), row[len(key) :], strict=True)))
    stretches = capacity.c.at_s < until_s
    told = [sa.func.sum(capacity.c[name]) for name in ("used_s", "idle_s", "usd")]
    slot = _slot(capacity.c.at_s, HOUR_S)
    summed = connection.execute(sa.select(slot, *told).where(stretches, capacity.c.journal != "").group_by(slot)).all()
    connection.execute(capacity.delete().where(stretches, capacity.c.journal != ""))
    for at_s, used_s, idle_s, usd in summed:
        # the sum of an hour has no journal; its number is the hour
        key = {"journal": "", "number": int(at_s) // HOUR_S, "at_s": at_s}
        _add(connection, capacity, key, {"used_s": used_s, "idle_s": idle_s, "usd": usd})


def _add(connection: sa.Connection, table: sa.Table, key: dict[str, Any], sums: dict[str, Any]) -> None:
    """An hour that came in parts, because a node was away, is one row all the same."""
    same = sa.and_(*(table.c[name] == value for name, value in key.items()))
    more = {name: sa.func.coalesce(table.c[name], 0) + value for name, value in sums.items() if value is not None}
    if not connection.execute(table.update().where(same).values(more)).rowcount:
        connection.execute(table.insert().values({**key, **sums}))


def _slot(column: sa.ColumnElement[float], width_s: int) -> sa.ColumnElement[float]:
    return sa.func.floor(column / width_s) * width_s


def usage(
    connection: sa.Connection, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None = None
) -> list[dict[str, Any]]:
    """Sums of [from_s, to_s) by any of `GROUPS` (hour and day as their beginning, in seconds since 1970)."""
    parts = []
    for table, count in ((requests, sa.literal(1)), (hours, hours.c.requests)):
        where = [table.c.at_s >= from_s, table.c.at_s < to_s]
        if tenant is not None:
            where.append(table.c.tenant == tenant)
        columns = [table.c[name] for name in ("at_s", *KEYS, *SUMS)]
        parts.append(sa.select(*columns, count.label("requests")).where(*where))
    both = sa.union_all(*parts).subquery()
    by = [
        _slot(both.c.at_s, WIDTHS_S[name]).label(name) if name in WIDTHS_S else both.c[name].label(name)
        for name in group_by
    ]
    sums = [sa.func.sum(both.c[name]).label(name) for name in ("requests", *SUMS)]
    query = sa.select(*by, *sums).group_by(*by).order_by(*by)
    # PostgreSQL sums integers to decimals
    whole = {"requests": int, "tokens": int}
    rows = []
    for found in connection.execute(query).mappings():
        if found["requests"]:
            told = [name for name in ("requests", *SUMS) if found[name] is not None]
            rows.append({**found, **{name: whole.get(name, float)(found[name]) for name in told}})
    return rows


def singles(connection: sa.Connection, from_s: float, to_s: float, most: int) -> list[dict[str, Any]]:
    """Requests of [from_s, to_s) one by one; of more than `most` evenly every k-th."""
    where = sa.and_(requests.c.at_s >= from_s, requests.c.at_s < to_s)
    count = connection.execute(sa.select(sa.func.count()).select_from(requests).where(where)).scalar_one()
    step = max(1, -(-count // most))
    names = ("at_s", "plan", "outcome", "total_s", "queue_s", "error_upper")
    query = sa.select(*(requests.c[name] for name in names)).where(where, requests.c.number % step == 0)
    return [dict(row) for row in connection.execute(query.order_by(requests.c.at_s)).mappings()]


def capacity_of(connection: sa.Connection, from_s: float, to_s: float) -> dict[str, float]:
    """Device seconds used and idle in [from_s, to_s), and what they cost, as far as replicas have told."""
    names = ("used_s", "idle_s", "usd")
    sums = [sa.func.coalesce(sa.func.sum(capacity.c[name]), 0.0) for name in names]
    found = connection.execute(sa.select(*sums).where(capacity.c.at_s >= from_s, capacity.c.at_s < to_s)).one()
    return dict(zip(names, map(float, found), strict=True))
