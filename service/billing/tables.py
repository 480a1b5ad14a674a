"""Tables of the ledger and the budgets, and their queries. SQLite or PostgreSQL, through SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.billing.query import HOUR_S, KEYS, WIDTHS_S
from service.billing.row import CapacityRow, LedgerRow

metadata = sa.MetaData()

# of the text columns; PostgreSQL rejects longer values
TEXT_LENGTHS = {
    "request_id": 128,
    "tenant": 64,
    "endpoint": 32,
    "model": 96,
    "plan": 16,
    "outcome": 24,
}
ADDED = ("host_s", "host_usd")  # later than the first tables: replicas of an older version write rows without them


def _columns(row: type[LedgerRow] | type[CapacityRow]) -> Iterator[sa.Column[Any]]:
    """Key (id of the write-ahead log, number in it), by which a row sent twice is recognised; then the row's fields."""
    yield sa.Column("journal", sa.String(64), primary_key=True)
    yield sa.Column("number", sa.BigInteger, primary_key=True)
    for name, kind in get_type_hints(row).items():
        is_nullable = kind == float | None
        column_type = sa.String(TEXT_LENGTHS[name]) if kind is str else sa.BigInteger() if kind is int else sa.Float(53)
        default = "0" if name in ADDED else None
        yield sa.Column(name, column_type, nullable=is_nullable, index=name == "at_s", server_default=default)


requests = sa.Table("requests", metadata, *_columns(LedgerRow))
capacity = sa.Table("capacity", metadata, *_columns(CapacityRow))

SUMS = (
    *("tokens", "flops", "flops_dense", "device_s", "host_s", "joules"),
    *("host_usd", "cost_usd", "charged_usd", "saved_usd"),
)
CAPACITY_SUMS = ("used_s", "idle_s", "usd")

# older requests: one row for each hour and combination of keys
hours = sa.Table(
    "hours",
    metadata,
    sa.Column("at_s", sa.Float(53), primary_key=True),  # start of the hour
    *(sa.Column(name, sa.String(96), primary_key=True) for name in KEYS),
    sa.Column("requests", sa.BigInteger, nullable=False),
    *(
        sa.Column(name, sa.Float(53), nullable=name == "joules", server_default="0" if name in ADDED else None)
        for name in SUMS
    ),
)

# what was left of a tenant's budget at a time
budgets = sa.Table(
    "budgets",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("budget", sa.String(32), primary_key=True),
    sa.Column("level", sa.Float(53), nullable=False),
    sa.Column("at_s", sa.Float(53), nullable=False),
)


def create(engine: sa.Engine) -> None:
    """Create what is missing: tables, and columns of tables that an older version made. Raises SQLAlchemyError."""
    try:
        metadata.create_all(engine)
    except sa.exc.DBAPIError:  # another process is creating them
        metadata.create_all(engine)
    _add_columns(engine)


def _add_columns(engine: sa.Engine) -> None:
    for table in (requests, hours):
        for name in set(ADDED) - _columns_of(engine, table):
            column = sa.schema.CreateColumn(table.c[name]).compile(dialect=engine.dialect)
            try:
                with engine.begin() as connection:
                    connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {column}")
            except sa.exc.DBAPIError:
                if name not in _columns_of(engine, table):  # else another process has just added it
                    raise


def _columns_of(engine: sa.Engine, table: sa.Table) -> set[str]:
    return {column["name"] for column in sa.inspect(engine).get_columns(table.name)}


def add_new(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows whose keys are new."""
    if rows:
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        connection.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))


def roll_up(connection: sa.Connection, before_s: float) -> None:
    """Replace requests and capacity of whole hours before `before_s` (seconds since 1970) by their sums."""
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

    # the sum of an hour has an empty log id, and the hour as its number
    old = sa.and_(capacity.c.at_s < until_s, capacity.c.journal != "")
    hour = _slot(capacity.c.at_s, HOUR_S)
    totals = sa.select(hour, *(sa.func.sum(capacity.c[name]) for name in CAPACITY_SUMS))
    summed = connection.execute(totals.where(old).group_by(hour)).all()
    connection.execute(capacity.delete().where(old))
    for at_s, *values in summed:
        key = {"journal": "", "number": int(at_s) // HOUR_S, "at_s": at_s}
        _add(connection, capacity, key, dict(zip(CAPACITY_SUMS, values, strict=True)))


def _add(connection: sa.Connection, table: sa.Table, key: dict[str, Any], sums: dict[str, Any]) -> None:
    """Add to the row of an hour: rows of a node that was away may arrive after its first roll-up."""
    same = sa.and_(*(table.c[name] == value for name, value in key.items()))
    more = {name: sa.func.coalesce(table.c[name], 0) + value for name, value in sums.items() if value is not None}
    if not connection.execute(table.update().where(same).values(more)).rowcount:
        connection.execute(table.insert().values({**key, **sums}))


def _slot(column: sa.ColumnElement[float], width_s: int) -> sa.ColumnElement[float]:
    return sa.func.floor(column / width_s) * width_s


def usage(
    connection: sa.Connection, from_s: float, to_s: float, group_by: Sequence[str], tenant: str | None = None
) -> list[dict[str, Any]]:
    """Sums of [from_s, to_s), in seconds since 1970, by any of `query.GROUPS`; hour and day are their first second."""
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
            known = [name for name in ("requests", *SUMS) if found[name] is not None]
            rows.append({**found, **{name: whole.get(name, float)(found[name]) for name in known}})
    return rows


def sample_requests(connection: sa.Connection, from_s: float, to_s: float, limit: int) -> list[dict[str, Any]]:
    """Single requests of [from_s, to_s), in order of time; if there are more than `limit`, every k-th."""
    where = sa.and_(requests.c.at_s >= from_s, requests.c.at_s < to_s)
    count = connection.execute(sa.select(sa.func.count()).select_from(requests).where(where)).scalar_one()
    step = max(1, -(-count // limit))
    names = ("at_s", "plan", "outcome", "total_s", "queue_s", "error_upper")
    query = sa.select(*(requests.c[name] for name in names)).where(where, requests.c.number % step == 0)
    return [dict(row) for row in connection.execute(query.order_by(requests.c.at_s)).mappings()]


def capacity_sums(connection: sa.Connection, from_s: float, to_s: float) -> dict[str, float]:
    """Device seconds used and idle in [from_s, to_s) and their cost, as far as replicas have recorded them."""
    sums = [sa.func.coalesce(sa.func.sum(capacity.c[name]), 0.0) for name in CAPACITY_SUMS]
    found = connection.execute(sa.select(*sums).where(capacity.c.at_s >= from_s, capacity.c.at_s < to_s)).one()
    return dict(zip(CAPACITY_SUMS, map(float, found), strict=True))
