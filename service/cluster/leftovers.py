"""What a service started and left behind: found by a variable that all of it inherits, never by a name, and killed.

Started as a file, with the mark as argument, it is the guard's small process: it waits for the end of its input. It
imports nothing but Python's own library, so that no other directory's module can take a place.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "SERVICE_OF_FARSIGHT"  # not FARSIGHT_...: those are settings
GONE_S = 10.0  # after SIGKILL
POLL_S = 0.02
PROC = Path("/proc")
DEAD = ("Z", "X")
ENDED = (errno.ESRCH, errno.EINVAL)  # of pidfd_open, the second if the id is a thread's now
WITHOUT = (errno.ENOSYS, errno.EPERM)  # old kernels and some sandboxes


class Alive(Exception):
    """Another service uses the same record, or what it left does not end; the message is one line."""


def mark_of(pid: int) -> str:
    """Identity of a process: its id is used again, but not with the same start time and boot; empty: not running."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    boot = ""
    with suppress(OSError):  # some sandboxes hide it
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return "" if state in DEAD else f"{pid}-{fields[18]}-{boot}"


def kill_marked(mark: str) -> None:
    """Kill everything with the mark, also what it starts meanwhile. Raises Alive if something does not end."""
    while mark and (found := _marked(mark)):
        for pid, descriptor in found.items():
            with suppress(ProcessLookupError):  # the end of another may have ended it
                if descriptor is not None:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                elif _has_mark(pid, mark):  # read again: the id may be another's by now
                    os.kill(pid, signal.SIGKILL)
        for pid, descriptor in found.items():
            if not _has_ended(pid, descriptor, mark):
                raise Alive(f"not ended by kill -9: process {pid}")


def _has_ended(pid: int, descriptor: int | None, mark: str) -> bool:
    """Wait for it. A zombie has not ended: other threads may still hold its ports."""
    if descriptor is not None:
        ended, _, _ = select.select([descriptor], [], [], GONE_S)
        os.close(descriptor)
        return bool(ended)
    until_s = time.monotonic() + GONE_S
    while _has_mark(pid, mark):
        if time.monotonic() > until_s:
            return False
        time.sleep(POLL_S)
    return True


def _marked(mark: str) -> dict[int, int | None]:
    """Process id -> descriptor of the process, which never means another one; None where there are none."""
    found: dict[int, int | None] = {}
    for entry in PROC.glob("[0-9]*"):
        pid, descriptor = int(entry.name), None
        try:
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in ENDED:
                continue
            if error.errno not in WITHOUT:
                raise
        if _has_mark(pid, mark):
            found[pid] = descriptor
        elif descriptor is not None:
            os.close(descriptor)
    return found


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it has ended, or belongs to another user


def main() -> None:
    sys.stdin.buffer.read()  # until the service ends
    try:
        kill_marked(sys.argv[1])
    except Alive as error:
        sys.exit(f"farsight: {error}")


if __name__ == "__main__":
    main()
