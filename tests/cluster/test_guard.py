"""Nothing that a service started outlives it, whatever ends it; shown with real processes that are killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cluster.guard import MARK, Alive, Guard, remove_leftovers

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

    def __init__(self, record: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(record)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
    assert not any(has_ended(descriptor, 0.3) for descriptor in service.started), "nobody has ended them"
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
