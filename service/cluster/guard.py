"""Whatever ends `farsight serve`, kill -9 included, nothing that it started is left.

A small process waits for its end and then kills what is left; if it was killed as well, the next start with the same
state directory does. Everything that the service starts inherits a variable with an identity of its own, by which it is
found, never by a name. `python -m service.cluster.guard MARK` is the small process.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# few imports: this process stays as long as the service
MARK = "SERVICE_OF_FARSIGHT"  # not FARSIGHT_...: those are settings
# programs that change their title otherwise write it over the variables that others can read
UNCHANGED = {"SPT_NOENV": "1"}
GONE_S = 10.0  # after SIGKILL
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # may be sent to all of us; the service ends first
PROC = Path("/proc")
DEAD = ("Z", "X")


class Alive(Exception):
    """Another service uses the same record, or what it left does not end; the message is one line."""


class Guard:
    """Guards this process from the start on. Raises Alive if the service of this record runs, and OSError."""

    def __init__(self, record: Path) -> None:
        remove_leftovers(record)
        self._mark = _mark_of(os.getpid())
        record.write_text(self._mark)  # stays: removing it could remove that of the next start
        self.environment = {MARK: self._mark, **UNCHANGED}  # for all that is started
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Start the guard again if something has killed it."""
        if self._process.poll() is not None:
            self._process = self._start()

    def end(self) -> None:
        """Kill what is left, and wait until it is gone."""
        self.check()
        self._process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # the pipe closes when this process ends, in whichever way; another session: signals of the group pass it by
        command = [sys.executable, "-m", "service.cluster.guard", self._mark]
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
    if not record.exists():
        return
    mark = record.read_text()
    pid = mark.partition("-")[0]
    if pid.isdigit() and _mark_of(int(pid)) == mark:
        raise Alive(f"already running as process {pid}, according to {record}")
    _kill_marked(mark)


def _mark_of(pid: int) -> str:
    """Identity of a process: its id is used again, but not with the same start time and boot; empty: not running."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return "" if state in DEAD else f"{pid}-{fields[18]}-{boot}"


def _kill_marked(mark: str) -> None:
    """Kill everything with the mark, also what it starts meanwhile. Raises Alive if something does not end."""
    while mark and (found := _marked(mark)):
        for descriptor in found.values():
            with suppress(ProcessLookupError):  # the end of another may have ended it
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for pid, descriptor in found.items():
            # a zombie has not ended: other threads may still hold its ports
            has_ended, _, _ = select.select([descriptor], [], [], GONE_S)
            os.close(descriptor)
            if not has_ended:
                raise Alive(f"not ended by kill -9: process {pid}")


def _marked(mark: str) -> dict[int, int]:
    """Process id -> descriptor of the process, which never means another one."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in PROC.glob("[0-9]*"):
        try:
            descriptor = os.pidfd_open(int(entry.name))
        except ProcessLookupError:
            continue
        try:
            is_ours = wanted in (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            is_ours = False  # it has ended, or belongs to another user
        if is_ours:
            found[int(entry.name)] = descriptor
        else:
            os.close(descriptor)
    return found


def main() -> None:
    sys.stdin.buffer.read()  # until the service ends
    try:
        _kill_marked(sys.argv[1])
    except Alive as error:
        sys.exit(f"farsight: {error}")


if __name__ == "__main__":
    main()
