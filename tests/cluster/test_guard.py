"""Nothing that a service started outlives it, whatever ends it; shown with real processes that are killed."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import disk
from service.cluster import guard, leftovers
from service.cluster.guard import Guard, remove_leftovers
from service.cluster.leftovers import MARK, Alive

# starts a process of another session that ignores SIGTERM, with a child and a thread, and says who is who
SERVICE = """
import os, subprocess, sys
from pathlib import Path
from service.cluster.guard import Guard
guard = Guard(Path(sys.argv[1]))
deep = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
deep += "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
environment = {**os.environ, **guard.environment}
started = subprocess.Popen(
    [sys.executable, "-c", deep], env=environment, start_new_session=True, stdout=subprocess.PIPE
)
print(guard.pid, started.pid, started.stdout.readline().decode().strip(), flush=True)
for line in sys.stdin:
    guard.check()
    print(guard.pid, flush=True)
guard.end()
"""


class Service:
    """A process that is guarded, and descriptors of its guard and of what it started."""

    def __init__(self, record: Path, directory: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVICE, str(record)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
        )
        self.guard, *self.started = (self._open(pid) for pid in self._line())

    def check(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        self.guard = self._open(self._line()[0])

    def _line(self) -> list[int]:
        assert self.process.stdout is not None
        return [int(pid) for pid in self.process.stdout.readline().split()]

    @staticmethod
    def _open(pid: int) -> int:
        return os.pidfd_open(pid)


def kill(descriptor: int) -> None:
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def has_ended(descriptor: int, within_s: float = 10.0) -> bool:
    return bool(select.select([descriptor], [], [], within_s)[0])


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "running-1"


@pytest.fixture
def service(record: Path) -> Iterator[Service]:
    running = Service(record)
    yield running
    running.process.kill()
    running.process.communicate()
    for descriptor in running.started:
        if not has_ended(descriptor, 0):
            kill(descriptor)


@pytest.fixture
def bystander() -> Iterator[int]:
    """Another service's process: the same program, the same variable, another mark."""
    other = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: "1-1-another"})
    yield os.pidfd_open(other.pid)
    other.kill()
    other.wait()


def test_kill_of_the_service_ends_what_it_started_and_nothing_else(service: Service, bystander: int) -> None:
    assert not any(has_ended(descriptor, 0) for descriptor in service.started)
    service.process.kill()
    assert all(has_ended(descriptor) for descriptor in (*service.started, service.guard))
    assert not has_ended(bystander, 0)


def test_the_next_start_ends_what_is_left_if_the_guard_was_killed_too(
    service: Service, record: Path, bystander: int
) -> None:
    kill(service.guard)
    assert has_ended(service.guard)
    service.process.kill()
    service.process.wait()
    assert not any(has_ended(descriptor, 0.3) for descriptor in service.started), "ended without the guard"
    remove_leftovers(record)
    assert all(has_ended(descriptor, 0) for descriptor in service.started), "before the start goes on"
    assert not has_ended(bystander, 0)


def test_a_killed_guard_is_replaced(service: Service) -> None:
    kill(service.guard)
    assert has_ended(service.guard)
    service.check()
    service.process.kill()
    assert all(has_ended(descriptor) for descriptor in (*service.started, service.guard))


def test_signals_to_all_of_us_leave_the_guard_in_place(service: Service) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.pidfd_send_signal(service.guard, number)
    assert not has_ended(service.guard, 0.3)
    service.process.communicate()  # the end of its input: it ends in order
    assert service.process.returncode == 0
    assert all(has_ended(descriptor, 0) for descriptor in (*service.started, service.guard))


def test_a_service_that_runs_is_not_a_leftover(service: Service, record: Path) -> None:
    with pytest.raises(Alive, match=f"already running as process {service.process.pid}"):
        Guard(record)
    assert not any(has_ended(descriptor, 0) for descriptor in service.started)


@pytest.mark.parametrize("text", [f"{os.getpid()}-1-an-earlier-boot", "", "something else"])
def test_a_record_that_is_not_of_a_running_process_stops_nothing(record: Path, bystander: int, text: str) -> None:
    record.write_text(text)
    remove_leftovers(record)
    assert not has_ended(bystander, 0)


def test_the_guard_imports_nothing_of_the_working_directory(tmp_path: Path, record: Path) -> None:
    for name in ("service/__init__.py", "service/cluster/__init__.py", "signal.py", "leftovers.py"):
        path = tmp_path / "foreign" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit(1)")
    running = Service(record, tmp_path / "foreign")
    try:
        assert not has_ended(running.guard, 0.5)
    finally:
        running.process.kill()
        running.process.communicate()
    assert all(has_ended(descriptor) for descriptor in (*running.started, running.guard))


@pytest.fixture
def ending(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Its process ends at once with status 3."""
    program = tmp_path / "ends.py"
    program.write_text("raise SystemExit(3)")
    monkeypatch.setattr(leftovers, "__file__", str(program))
    monkeypatch.setattr(guard, "PAUSES_S", (0.0, 0.1, 0.2))
    guarded = Guard(record)
    yield guarded
    guarded.end()


def test_a_guard_that_ends_at_once_is_reported_once_and_not_started_forever(
    ending: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    pids, until_s = {ending.pid}, time.monotonic() + 10
    while not caplog.records and time.monotonic() < until_s:
        ending.check()
        pids.add(ending.pid)
        time.sleep(0.01)
    for _ in range(20):
        ending.check()
        pids.add(ending.pid)
        time.sleep(0.02)
    assert len(pids) == 4
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "the guard ends at once, last with 3" in said.message


def test_the_end_kills_what_is_left_where_the_guard_cannot(ending: Guard) -> None:
    started = subprocess.Popen(["sleep", "600"], env={**os.environ, **ending.environment})
    ending.end()
    assert started.wait(0.5) == -signal.SIGKILL


def test_a_full_disk_starts_without_a_record_and_keeps_the_old_one_until_there_is_room(
    record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record.write_text("earlier")

    def full(path: object, *_: object) -> None:
        if path == record:
            record.write_bytes(b"")  # opening it makes it empty before its text finds no room
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(disk.os, "open", full)  # of the lock
        guarded = Guard(record)
    assert record.read_text() == "earlier"
    assert [file.name for file in record.parent.iterdir()] == [record.name]
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    guarded.check()
    assert record.read_text().startswith(f"{os.getpid()}-")
    guarded.end()


def test_of_two_starts_at_the_same_time_one_is_refused(record: Path) -> None:
    """Before the first has written its record."""
    running = Service(record)
    record.unlink()
    with pytest.raises(Alive, match=f"another process holds {record}.lock"):
        Guard(record)
    running.process.kill()
    assert has_ended(running.guard)
    running.process.communicate()
    Guard(record).end()


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        guard.lock(tmp_path / "lock")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_processes_are_killed_without_descriptors_where_there_are_none(
    bystander: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    started = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: "1-1-mine"})
    _fail_to_open(monkeypatch, number)
    leftovers.kill_marked("1-1-mine")
    assert started.wait(1) == -signal.SIGKILL
    assert not has_ended(bystander, 0)


def test_an_id_that_became_a_threads_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_open(monkeypatch, errno.EINVAL)
    leftovers.kill_marked("1-1-mine")


def _fail_to_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", fails)


def test_a_process_has_an_identity_where_the_boot_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def hidden(path: Path) -> str:
        if path.name == "boot_id":
            raise PermissionError
        return read(path)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert leftovers.mark_of(os.getpid()).startswith(f"{os.getpid()}-")
