"""The open loop: a service or a client that stalls does not slow the load down, and shows in the latencies."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gevent
import pytest
from gevent.event import Event

from loadtests import samples, schedule
from loadtests.mix import Endpoint, Planned
from loadtests.run import LOCUSTFILE
from loadtests.samples import Outcome, Sample, Sent
from loadtests.schedule import drive

HEADERS = {"x-attention-plan": "dense", "x-queue-seconds": "0", "x-device-seconds": "0.25", "x-cost-usd": "7e-06"}
PLANNED = [Planned(0.01 * index, Endpoint.EMBEDDINGS, 10) for index in range(20)]


def test_a_stalled_service_gets_all_requests_and_all_of_them_show_it() -> None:
    start_s, released = time.perf_counter(), Event()
    arrived: list[float] = []
    released_s: list[float] = []

    def send(planned: Planned, sent: Sent) -> Sample:
        arrived.append(planned.at_s)
        if len(arrived) == len(PLANNED):  # a closed loop would never come here
            released_s.append(time.perf_counter() - start_s)
            released.set()
        released.wait()
        return sent.answered(time.perf_counter() - start_s, HEADERS)

    found = drive(PLANNED, start_s, send)
    assert [one.at_s for one in found] == [one.at_s for one in PLANNED]
    assert all(one.latency_s >= released_s[0] - one.at_s for one in found)
    assert found[0].latency_s >= PLANNED[-1].at_s  # the first waited for the last


def test_a_stalled_client_shows_too() -> None:
    start_s = time.perf_counter()

    def send(planned: Planned, sent: Sent) -> Sample:
        if planned.at_s == 0:
            while time.perf_counter() - start_s < PLANNED[-1].at_s:  # nobody else runs
                pass
        return sent.answered(time.perf_counter() - start_s, HEADERS)

    found = drive(PLANNED, start_s, send)
    assert all(one.sent_s >= PLANNED[-1].at_s for one in found[1:])
    assert all(one.latency_s >= PLANNED[-1].at_s - one.at_s for one in found)


def test_what_is_never_answered_or_never_sent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "DRAIN_S", 0.05)
    monkeypatch.setattr(schedule, "MOST_IN_FLIGHT", 5)

    def send(planned: Planned, sent: Sent) -> Sample:
        gevent.sleep(3600)
        raise AssertionError("it is killed")

    found = drive(PLANNED, time.perf_counter(), send)
    assert [one.outcome for one in found] == [Outcome.FAILED] * 20
    assert ["no answer" in one.reason for one in found] == [True] * 5 + [False] * 15
    assert all("5 in flight" in one.reason for one in found[5:])


class Stalling(ThreadingHTTPServer):
    """Answers nothing that comes while it stalls; the first ones, which warm up, at once."""

    daemon_threads = True

    def __init__(self, warm_up: int, until: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.counted, self.warm_up, self.until = 0, warm_up, until
        self.released, self.lock = threading.Event(), threading.Lock()
        self.released_s = 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stalling

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.counted += 1
            count = self.server.counted
        if count == self.server.until:
            self.server.released_s = time.perf_counter()
            self.server.released.set()
        if count > self.server.warm_up:
            self.server.released.wait()
        self.send_response(200)
        for name, value in {**HEADERS, "content-length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_locust_sends_on_while_the_service_stalls_and_keeps_every_latency(tmp_path: Path) -> None:
    trace, found, begun = tmp_path / "trace.csv", tmp_path / "samples.ndjson", tmp_path / "begun"
    with trace.open("w", newline="") as file:
        csv.writer(file).writerows([("at_s", "tokens", "model"), *((0.02 * at, 10, "mini") for at in range(30))])
    server = Stalling(warm_up=3, until=33)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--trace", str(trace), "--only-summary"]
        command += ["--host", f"http://127.0.0.1:{server.server_port}", "--samples", str(found)]
        ended = subprocess.run([*command, "--started", str(begun)], capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert ended.returncode == 0, ended.stderr
    read = samples.read(found)
    start_s = float(begun.read_text())
    assert [one.outcome for one in read] == [Outcome.ANSWERED] * 30
    assert all(one.ended_s >= server.released_s - start_s for one in read)
    assert read[0].latency_s >= 0.58  # it was due 29 requests before the one that ended the stall
    assert {one.plan for one in read} == {"dense"}
