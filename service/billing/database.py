"""The database of the ledger: opened at the first use, and anew when its file was deleted or replaced, or after errors.

SQLite would go on writing into a deleted file, where nothing is kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from service.billing import tables

logger = logging.getLogger("farsight")

READ_ONLY = "is_read_only"  # execution option of a connection
Identity = tuple[int, int] | None  # of a file: device and number


class FileLost(Exception):
    """The database's file was deleted or replaced during a transaction, which may not be in the new one."""


class Database:
    """Used by several threads."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        name = self._url.database or ":memory:"
        is_file = self._url.get_backend_name() == "sqlite" and not name.startswith((":memory:", "file:"))
        self._path = Path(name) if is_file else None
        self._engine: sa.Engine | None = None
        self._identity: tuple[Identity, Identity] = None, None
        self.losses = 0  # files that were deleted or replaced
        self._is_suspect = False  # a transaction failed
        self._active = 0  # transactions
        self._changed = threading.Condition()

    @contextmanager
    def begin(self, *, is_read_only: bool = False, isolation_level: str | None = None) -> Iterator[sa.Connection]:
        """A transaction. Raises OSError, SQLAlchemyError, and FileLost if the file was gone before it was committed.

        isolation_level: of PostgreSQL; SQLite has only one.
        """
        engine = self._enter().execution_options(**{READ_ONLY: is_read_only})
        try:
            if isolation_level is not None and engine.dialect.name == "postgresql":
                engine = engine.execution_options(isolation_level=isolation_level)
            with engine.begin() as connection:
                yield connection
            if self._is_lost():
                raise FileLost(f"{self._path} was deleted or replaced during a transaction")
        except (sa.exc.IntegrityError, sa.exc.DataError):  # of the rows
            raise
        except (sa.exc.SQLAlchemyError, FileLost) as error:
            # opened anew: a connection to a file that was read-only stays so. One to a full disk goes on by itself
            if self._path is not None and not is_disk_full(error):
                self._is_suspect = True  # until it is opened: another thread's error stays
            raise
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def _enter(self) -> sa.Engine:
        """Count a transaction on the open database. Raises OSError and SQLAlchemyError if it cannot be opened."""
        with self._changed:
            while self._is_stale() and self._active:
                self._changed.wait()  # connections to the old file and to the new one would disturb each other
            if self._is_stale():
                self._open()
            assert self._engine is not None, "bug: not open"
            self._active += 1
            return self._engine

    def _is_stale(self) -> bool:
        return self._engine is None or self._is_suspect or self._is_lost()

    def _open(self) -> None:
        if self._engine is not None:
            is_lost = self._is_lost()
            self._engine.dispose()
            self._engine = None
            if is_lost:
                self.losses += 1
                kept = self._set_log_aside()
                logger.error(
                    "%s was deleted or replaced: opened anew; what only the old file had is lost%s",
                    self._path,
                    f"; if it was moved, its last rows are in {kept}: name that like the moved file, with -wal at the "
                    "end"
                    if kept
                    else "",
                )
        self._engine = connect(self._url, self._path)
        self._identity, self._is_suspect = self._seen(), False

    def _set_log_aside(self) -> Path | None:
        """Rename the old file's log where it still is: SQLite would apply it to the new file.

        A file that was moved away needs it: rows that were committed are in the log only.
        """
        _, log = self._seen()
        if log is None or log != self._identity[1]:
            return None
        second = int(time.time())
        while (kept := Path(f"{self._path}-wal.lost-{second}")).exists():
            second += 1
        os.rename(f"{self._path}-wal", kept)
        Path(f"{self._path}-shm").unlink(missing_ok=True)
        return kept

    def _is_lost(self) -> bool:
        """The file, or SQLite's log of it, is not the one that was opened."""
        if self._path is None:
            return False
        (file, log), (opened, opened_log) = self._seen(), self._identity
        return file is None or file != opened or (opened_log or log) != log

    def _seen(self) -> tuple[Identity, Identity]:
        """Which database and which log of it are there now. The number of a file in use is not used again."""
        return _identity(self._path, ""), _identity(self._path, "-wal")


def is_disk_full(error: Exception) -> bool:
    """SQLite reports it by these codes, the second for the file that its processes share."""
    return getattr(getattr(error, "orig", None), "sqlite_errorname", "") in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


def _identity(path: Path | None, suffix: str) -> Identity:
    try:
        found = os.stat(f"{path}{suffix}")
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def connect(url: sa.URL, path: Path | None) -> sa.Engine:
    """Open a database, SQLite's in the file `path`, and create missing tables. Raises OSError and SQLAlchemyError."""
    engine = sa.create_engine(url, pool_pre_ping=path is None)
    if engine.dialect.name == "sqlite":
        _configure_sqlite(engine, path)
    try:
        tables.create(engine)
    except sa.exc.SQLAlchemyError:
        engine.dispose()
        raise
    return engine


def _configure_sqlite(engine: sa.Engine, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        for suffix in ("-wal", "-shm"):
            # made while the database was read-only, they would stay so
            with suppress(FileNotFoundError, PermissionError):
                os.chmod(f"{path}{suffix}", path.stat().st_mode & 0o777)

        @sa.event.listens_for(engine, "do_connect")
        def _(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
            # never create it: all users could read what SQLite creates
            arguments[0], options["uri"] = f"file:{quote(str(path))}?mode=rw", True

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below
        # a commit survives the crash of any process; a crash of the machine may lose the last ones
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA busy_timeout=10000")

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        # writers lock at the start: a level must not change between reading and writing it
        is_read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
