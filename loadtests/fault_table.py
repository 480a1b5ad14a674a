"""What `python -m loadtests.faults` does to a running service, and within which limits it must be whole again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.servers.process import session
from service.config import Config

STALLED = 2000
REPLICA_S, HAPROXY_S, END_S = 20.0, 5.0, 5.0  # until the service is whole again, or nothing is left of it
DISK_BYTES = 64 << 20  # of the state directory that becomes full


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started here; `leader` is the process id of `farsight serve`."""

    leader: int
    config: Config

    def processes(self, part: str) -> list[psutil.Process]:
        """Those whose command line contains `part`, oldest first."""
        found = []
        for process in session(self.leader):
            with suppress(psutil.NoSuchProcess):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def haproxy(self) -> list[psutil.Process]:
        return [one for one in self.processes(str(self.config.haproxy_dir)) if one.name() == "haproxy"]


Act = Callable[[Running], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """Either `act` happens once, or `hold` lasts for some seconds, and the recovery counts from its end.

    `most_s`: limit until the service is whole again, or gone. `most_failed`: limit of failed requests.
    `is_replica`: one is replaced. `is_end`: the service ends; nothing may be left of it, and the next start must work.
    `is_on_disk`: the state directory is a mount of its own.
    """

    about: str
    act: Act | None = None
    hold: Callable[[Running], Iterator[None]] | None = None
    most_s: float | None = None
    most_failed: int | None = None
    is_end: bool = False
    is_replica: bool = False
    is_on_disk: bool = False


def _kill(part: str) -> Act:
    def act(running: Running) -> None:
        running.processes(part)[0].kill()

    return act


def _kill_haproxy(running: Running) -> None:
    for process in running.haproxy():
        process.kill()


def _kill_leader(running: Running) -> None:
    os.kill(running.leader, signal.SIGKILL)


def _kill_group(running: Running) -> None:
    os.killpg(running.leader, signal.SIGKILL)


def _stop_replica(running: Running) -> None:
    running.processes("ServeReplica")[0].suspend()


def _delete_ledger(running: Running) -> None:
    for path in _state(running).glob(f"ledger-{running.config.metrics_port}.sqlite*"):
        path.unlink()


def _read_only(running: Running) -> Iterator[None]:
    for option in ("ro", "rw"):
        subprocess.run(["mount", "-o", f"remount,{option}", str(_state(running))], check=True, capture_output=True)
        if option == "ro":
            yield


def _disk_full(running: Running) -> Iterator[None]:
    path = _state(running) / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    path.unlink()


def _stalled_bodies(running: Running) -> Iterator[None]:
    head = (
        b"POST /v1/attention HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n{"
    )
    connections = []
    for _ in range(STALLED):
        connections.append(socket.create_connection(("127.0.0.1", running.config.http_port), timeout=10))
        connections[-1].sendall(head)
    yield
    for connection in connections:
        connection.close()


def _state(running: Running) -> Path:
    return running.config.state_dir


FAULTS = {
    "replica": Fault(
        "kill -9 of one of two replicas", _kill("ServeReplica"), most_s=REPLICA_S, most_failed=0, is_replica=True
    ),
    "haproxy": Fault("kill -9 of HAProxy", _kill_haproxy, most_s=HAPROXY_S),
    "haproxy-manager": Fault("kill -9 of HAProxy's manager", _kill("HAProxyManager"), most_s=HAPROXY_S),
    "ledger-actor": Fault("kill -9 of the ledger's actor", _kill("_LedgerActor"), most_s=REPLICA_S),
    "controller": Fault("kill -9 of Serve's controller", _kill("ServeController"), most_s=REPLICA_S),
    "replica-silent": Fault("SIGSTOP of one of two replicas", _stop_replica, is_replica=True),
    "gcs": Fault("kill -9 of Ray's GCS", _kill("gcs_server"), most_s=END_S, is_end=True),
    "serve": Fault("kill -9 of farsight serve", _kill_leader, most_s=END_S, is_end=True),
    "serve-group": Fault("kill -9 of farsight serve and its process group", _kill_group, most_s=END_S, is_end=True),
    "ledger-deleted": Fault("the ledger's file is deleted", _delete_ledger),
    "state-read-only": Fault("the state directory is read-only", hold=_read_only, most_s=REPLICA_S, is_on_disk=True),
    "disk-full": Fault("the disk of the state is full", hold=_disk_full, most_s=REPLICA_S, is_on_disk=True),
    "stalled-bodies": Fault(
        f"{STALLED} requests whose bodies never end", hold=_stalled_bodies, most_s=HAPROXY_S, most_failed=0
    ),
}
