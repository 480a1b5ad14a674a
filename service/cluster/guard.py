"""Whatever ends `farsight serve`, kill -9 included, nothing that it started is left.

A small process waits for its end and then kills what is left; if it was killed as well, the next start with the same
state directory does. Everything that the service starts inherits a variable with an identity of its own; see
`leftovers`, which is also the small process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from service.cluster import leftovers
from service.cluster.leftovers import MARK, Alive, kill_marked, mark_of
from service.disk import is_full, write_whole

logger = logging.getLogger("farsight")

# programs that change their title otherwise write it over the variables that others can read
UNCHANGED = {"SPT_NOENV": "1"}
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # may be sent to all of us; the service ends first
PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # before the guard is started again; after the last it is given up
LASTING_S = 60.0  # a guard that ran this long is not one that ends at once


class Guard:
    """Guards this process from the start on. Raises Alive if the service of this record runs, and OSError.

    On a full disk it guards without a record until there is room; see `check`.
    """

    def __init__(self, record: Path) -> None:
        _refuse_running(record)
        _lock_beside(record)
        remove_leftovers(record)
        self._record, self._mark = record, mark_of(os.getpid())
        self._is_recorded = self._write()
        if not self._is_recorded:
            logger.warning("the disk of %s is full: started without it", record)
        self.environment = {MARK: self._mark, **UNCHANGED}  # for all that is started
        self._process = self._start()
        self._started_s, self._tries = time.monotonic(), 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Start the guard again if something has ended it, a few times; write the record if it could not be."""
        self._is_recorded = self._is_recorded or self._write()
        status, ran_s = self._process.poll(), time.monotonic() - self._started_s
        if status is None:
            self._tries = self._tries if ran_s < LASTING_S else 0
        elif self._tries < len(PAUSES_S):
            if ran_s >= PAUSES_S[self._tries]:
                self._started_s, self._tries = time.monotonic(), self._tries + 1
                self._process.communicate()  # closes the pipe
                self._process = self._start()
        elif self._tries == len(PAUSES_S):
            self._tries += 1  # said once
            logger.warning(
                "the guard ends at once, last with %s: if this process is killed, what it started stays until the "
                "next start",
                status,
            )

    def end(self) -> None:
        """Kill what is left, and wait until it is gone."""
        self._process.communicate()
        if self._process.returncode:  # it was killed before, or could not
            try:
                kill_marked(self._mark)
            except Alive as error:
                logger.error("%s", error)

    def _write(self) -> bool:
        try:
            write_whole(self._record, self._mark)  # stays: removing it could remove that of the next start
        except OSError as error:
            if not is_full(error):
                raise
            return False
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        # the pipe closes when this process ends, in whichever way; another session: signals of the group pass it by
        command = [sys.executable, "-I", leftovers.__file__, self._mark]  # isolated: no module of another directory
        environment = {name: value for name, value in os.environ.items() if name != MARK}  # it would kill itself
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # inherited
        try:
            return subprocess.Popen(  # noqa: S603 (our own module)
                command, stdin=subprocess.PIPE, start_new_session=True, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_leftovers(record: Path) -> None:
    """Kill what a killed service left. Raises Alive if it runs, or if something does not end."""
    _refuse_running(record)
    if record.exists():
        kill_marked(record.read_text())


def lock(path: Path) -> None:
    """Hold a file's lock until this process ends, in whichever way. Raises Alive if another has it, and OSError."""
    # not inherited by what is started; not through another user's link
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise Alive(f"already running or starting: another process holds {path}") from None
        raise


def _lock_beside(record: Path) -> None:
    """Two starts at the same time would both find no record. A full disk may have no room for the lock."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        lock(record.with_name(f"{record.name}.lock"))
    except OSError as error:
        if not is_full(error):
            raise


def _refuse_running(record: Path) -> None:
    if record.exists():
        mark = record.read_text()
        pid = mark.partition("-")[0]
        if pid.isdigit() and mark_of(int(pid)) == mark:
            raise Alive(f"already running as process {pid}, according to {record}")
