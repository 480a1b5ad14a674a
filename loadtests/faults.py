"""`python -m loadtests.faults`: each fault of the table happens to a service of its own under a light load.

Measured are the seconds until requests are answered again and until all replicas are up again, failed requests, and
answered requests that are missing in the ledger; of a service that ends, what is left and whether the next one starts.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.request import urlopen

import psutil
import typer

from benchmarks.report import document
from benchmarks.servers.lineup import LINEUP, Place
from benchmarks.servers.process import Unavailable, await_answer, handling, is_taken, session, stop
from loadtests.fault_probe import Probe
from loadtests.fault_table import DISK_BYTES, FAULTS, Fault, Running
from loadtests.target import READY
from service.commands.terminal import console, fail
from service.config import Config

REPLICAS = 2
BEFORE_S, QUIET_S, HOLD_S = 3.0, 5.0, 15.0
RECOVERY_S = 120.0  # waited for
END_S = 120.0  # for a service whose end is expected


@contextmanager
def started(config: Config) -> Iterator[Running]:
    """Run `farsight serve` during the block, unless it ends by itself. Raises Unavailable."""
    contender = LINEUP[0]
    place = Place(sys.executable, Path(), config.http_port, config.state_dir)
    log = config.state_dir.parent / "serve.log"
    environment = {**contender.environment(place), "FARSIGHT_REPLICAS": f"{REPLICAS}", "FARSIGHT_CPU_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        await_answer(process, contender, config.http_port, READY, log)
        running = Running(process.pid, config)
        _await_up(running, time.monotonic())
        yield running
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(END_S)
    finally:
        stop(process)


def up(running: Running) -> set[str]:
    """Names of the replicas that answer, according to HAProxy; empty while its statistics are away."""
    try:
        with urlopen(f"http://127.0.0.1:{running.config.haproxy_stats_port}/stats;csv", timeout=2) as answer:
            rows = list(csv.DictReader(answer.read().decode().splitlines()))
    except OSError:
        return set()
    servers = [row for row in rows if row["# pxname"] == "http-farsight" and "SERVE_REPLICA" in row["svname"]]
    return {row["svname"] for row in servers if row["status"].startswith("UP")}


def _await_up(running: Running, since_s: float, lost: frozenset[str] = frozenset()) -> float | None:
    """Seconds since `since_s` until all replicas are up, and not those that were lost; None: not in time."""
    while time.monotonic() < since_s + RECOVERY_S:
        names = up(running)
        if len(names) == REPLICAS and names != lost:
            return time.monotonic() - since_s
        time.sleep(0.1)
    return None


def _recovered(running: Running, fault: Fault) -> dict[str, Any]:
    """Let the fault happen and wait until the service is whole again."""
    with Probe(running.config.http_port) as probe:
        time.sleep(BEFORE_S)
        before = frozenset(up(running))
        start_s = since_s = time.monotonic()
        if fault.act:
            fault.act(running)
        if fault.hold:
            with contextmanager(fault.hold)(running):
                time.sleep(HOLD_S)
            since_s = time.monotonic()
        whole_s = _await_up(running, since_s, before if fault.is_replica else frozenset())
        time.sleep(QUIET_S)
        while (failed := probe.failed(start_s)) and time.monotonic() < failed[-1].ended_s + QUIET_S:
            if time.monotonic() > since_s + RECOVERY_S:
                break
            time.sleep(0.1)
    failed = probe.failed(start_s)
    reasons = sorted({attempt.reason for attempt in failed})
    return {
        "answers_again_s": round(max(0.0, failed[-1].ended_s - since_s), 2) if failed else 0.0,
        "whole_again_s": whole_s and round(whole_s, 2),
        "requests": len(probe.attempts),
        "failed": len(failed),
        "reasons": reasons[:5],
        "answered": [attempt.id for attempt in probe.answered()],
    }


def _ended(running: Running, fault: Fault) -> dict[str, Any]:
    """Let the fault happen; what is left when the service has ended."""
    known = session(running.leader)
    ports = _listening(running)
    with Probe(running.config.http_port) as probe:
        time.sleep(BEFORE_S)
        start_s = time.monotonic()
        assert fault.act is not None, "bug: only acts end a service"
        fault.act(running)
        while True:
            left, ports_left = _alive(known, running), [port for port in ports if is_taken(port)]
            ended_s = time.monotonic() - start_s
            if not (left or ports_left) or ended_s > END_S:
                break
            time.sleep(0.02)
    return {
        "gone_s": None if left or ports_left else round(ended_s, 2),
        "left_behind": sorted(process.name() for process in left),
        "ports_left": ports_left,
        "requests": len(probe.attempts),
        "answered": [attempt.id for attempt in probe.answered()],
    }


def _alive(known: list[psutil.Process], running: Running) -> list[psutil.Process]:
    every = {*known, *session(running.leader)}
    return [one for one in every if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _listening(running: Running) -> list[int]:
    first = running.config.http_port
    return [port for port in range(first, first + 300) if is_taken(port)]


def _missing(config: Config, answered: list[str]) -> int:
    """Answered requests without a row in the ledger."""
    with sqlite3.connect(config.ledger.removeprefix("sqlite:///")) as ledger:
        rows = {row[0] for row in ledger.execute("SELECT request_id FROM requests")}
    return len(set(answered) - rows)


def measured(name: str, first_port: int) -> dict[str, Any]:
    """One row of the table. Raises Unavailable."""
    fault = FAULTS[name]
    with TemporaryDirectory(prefix="farsight-faults-") as folder:
        state = Path(folder) / "state"
        state.mkdir()
        config = Config.model_validate({**_ports(first_port), "state_dir": state})
        with _disk(state) if fault.is_on_disk else nullcontext():
            with started(config) as running:
                found = _ended(running, fault) if fault.is_end else _recovered(running, fault)
            if fault.is_end:
                again_s = time.monotonic()
                with started(config):
                    found["next_start_s"] = round(time.monotonic() - again_s, 1)
            answered = found.pop("answered")
            found |= {"answered": len(answered), "missing_in_ledger": _missing(config, answered)}
    return {"about": fault.about, **found, "missed": missed(fault, found)}


def _ports(first: int) -> dict[str, int]:
    names = ("http_port", "grpc_port", "metrics_port", "haproxy_metrics_port", "haproxy_stats_port")
    return {**{name: first + index for index, name in enumerate(names)}, "replica_port_base": first + 100}


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A small disk of its own at `path`; needs root."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True, capture_output=True)


def missed(fault: Fault, found: dict[str, Any]) -> list[str]:
    """The limits that were missed, in words."""
    checks = {f"{found['missing_in_ledger']} answered requests are missing in the ledger": found["missing_in_ledger"]}
    if fault.is_end:
        checks["something was left behind"] = found["left_behind"] or found["ports_left"]
    else:
        checks["not whole again"] = found["whole_again_s"] is None
    if fault.most_s is not None:
        took_s = (
            found["gone_s"] or 0.0 if fault.is_end else max(found["answers_again_s"], found["whole_again_s"] or 0.0)
        )
        checks[f"{took_s:.1f} s, limit {fault.most_s:.0f} s"] = took_s > fault.most_s
    if fault.most_failed is not None:
        checks[f"{found['failed']} requests failed, limit {fault.most_failed}"] = found["failed"] > fault.most_failed
    return [text for text, is_missed in checks.items() if is_missed]


def main(
    fault: Annotated[list[str] | None, typer.Option(help=f"{', '.join(FAULTS)}; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON.")] = None,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="First of 300 ports that are used.")] = 21600,
) -> None:
    """Let faults happen to a service under load; exit with 1 if a limit is missed."""
    names = fault or list(FAULTS)
    if unknown := set(names) - FAULTS.keys():
        fail(f"fault: expected one of {', '.join(FAULTS)}, got {', '.join(sorted(unknown))}")
    rows = {}
    with handling(signal.default_int_handler):
        for name in names:
            if FAULTS[name].is_on_disk and os.getuid() != 0:
                console.print(f"{name}: left out, a disk of its own needs root")
                continue
            try:
                rows[name] = measured(name, first_port)
            except Unavailable as error:
                rows[name] = {"about": FAULTS[name].about, "missed": [str(error)]}
            console.print(f"{name}: {json.dumps(rows[name])}", soft_wrap=True, markup=False)
            if output:
                output.write_text(json.dumps(document(rows, "loadtests.faults"), indent=1) + "\n")
    sys.exit(any(row["missed"] for row in rows.values()))


if __name__ == "__main__":
    typer.run(main)
