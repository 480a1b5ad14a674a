"""The open loop: a service or a client that stalls does not slow the load down, and shows in the latencies."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gevent
import grpc
import pytest
from gevent.event import Event

from loadtests import samples, schedule
from loadtests.mix import Endpoint, Planned
from loadtests.run import LOCUSTFILE
from loadtests.samples import Outcome, Sample, Sent
from loadtests.schedule import drive
from service.api.proto import open_inference_grpc_pb2 as pb
from service.api.proto.open_inference_grpc_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

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
    assert [sample.at_s for sample in found] == [sample.at_s for sample in PLANNED]
    assert all(sample.latency_s >= released_s[0] - sample.at_s for sample in found)
    assert found[0].latency_s >= PLANNED[-1].at_s  # the first waited for the last


def test_a_stalled_client_shows_too() -> None:
    start_s = time.perf_counter()

    def send(planned: Planned, sent: Sent) -> Sample:
        if planned.at_s == 0:
            while time.perf_counter() - start_s < PLANNED[-1].at_s:  # nothing else runs
                pass
        return sent.answered(time.perf_counter() - start_s, HEADERS)

    found = drive(PLANNED, start_s, send)
    assert all(sample.sent_s >= PLANNED[-1].at_s for sample in found[1:])
    assert all(sample.latency_s >= PLANNED[-1].at_s - sample.at_s for sample in found)


def test_what_is_never_answered_or_never_sent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "DRAIN_S", 0.05)
    monkeypatch.setattr(schedule, "MAX_IN_FLIGHT", 5)

    def send(planned: Planned, sent: Sent) -> Sample:
        gevent.sleep(3600)
        raise AssertionError("bug: the greenlet is killed")

    found = drive(PLANNED, time.perf_counter(), send)
    assert [sample.outcome for sample in found] == [Outcome.FAILED] * 20
    assert ["no answer" in sample.reason for sample in found] == [True] * 5 + [False] * 15
    assert all("5 in flight" in sample.reason for sample in found[5:])


class Stall:
    """Holds every request back until all have come; the first ones, which warm up, are answered at once."""

    def __init__(self, warm_up: int, all_of_them: int) -> None:
        self.warm_up, self.all_of_them = warm_up, all_of_them
        self.counted, self.released_s = 0, 0.0
        self.released, self.lock = threading.Event(), threading.Lock()

    def passed(self) -> None:
        with self.lock:
            self.counted += 1
            count = self.counted
        if count == self.all_of_them:
            self.released_s = time.perf_counter()
            self.released.set()
        if count > self.warm_up:
            self.released.wait(60)


class Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stall: Stall

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.stall.passed()
        self.send_response(200)
        for name, value in {**HEADERS, "content-length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Infer(GRPCInferenceServiceServicer):
    def __init__(self, stall: Stall) -> None:
        self.stall = stall

    def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> pb.ModelInferResponse:
        self.stall.passed()
        response = pb.ModelInferResponse()
        for name, value in HEADERS.items():
            response.parameters[name].string_param = value
        return response


@contextmanager
def stalling(stall: Stall) -> Iterator[tuple[int, int]]:
    """A service: its HTTP and gRPC ports."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Http,), {"stall": stall}))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    rpc = grpc.server(ThreadPoolExecutor(100))
    add_GRPCInferenceServiceServicer_to_server(Infer(stall), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    yield http.server_port, port
    http.shutdown()
    thread.join()
    http.server_close()
    rpc.stop(None).wait()


def test_locust_sends_on_while_the_service_stalls_and_keeps_every_latency(tmp_path: Path) -> None:
    trace, found, begun = tmp_path / "trace.csv", tmp_path / "samples.ndjson", tmp_path / "begun"
    count, each = 80, 0.02
    with trace.open("w", newline="") as file:
        rows = [(each * at, 10, "mini" if at % 4 < 2 else "") for at in range(count)]
        csv.writer(file).writerows([("at_s", "tokens", "model"), *rows])
    stall = Stall(warm_up=9, all_of_them=9 + count)  # three of each endpoint
    with stalling(stall) as (http_port, grpc_port):
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--trace", str(trace), "--only-summary"]
        command += ["--host", f"http://127.0.0.1:{http_port}", "--grpc-port", f"{grpc_port}", "--samples", str(found)]
        ended = subprocess.run([*command, "--started", str(begun)], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    read = samples.read(found)
    assert Counter(sample.endpoint for sample in read) == {
        Endpoint.EMBEDDINGS: count // 2,
        Endpoint.ATTENTION: count // 4,
        Endpoint.INFER: count // 4,
    }
    assert {sample.outcome for sample in read} == {Outcome.ANSWERED}
    assert {sample.plan for sample in read} == {"dense"}
    released_s = stall.released_s - float(begun.read_text())
    assert all(sample.ended_s >= released_s for sample in read)
    assert read[0].latency_s >= each * (count - 1)  # it was due long before the one that ended the stall
