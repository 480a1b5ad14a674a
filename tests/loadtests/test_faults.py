"""The table of faults: its limits can be missed, and the probe counts what really happens to requests."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtests.fault_probe import Probe
from loadtests.fault_table import FAULTS, Fault
from loadtests.faults import missed

WHOLE = {"missing_in_ledger": 0, "answers_again_s": 0.0, "whole_again_s": 1.0, "failed": 0}
GONE = {"missing_in_ledger": 0, "gone_s": 1.0, "left_behind": [], "ports_left": []}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_fault_happens_once_or_lasts(fault: Fault) -> None:
    assert (fault.act is None) != (fault.hold is None)
    assert fault.act or not fault.is_end


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"missing_in_ledger": 2}, ["2 answered requests are missing in the ledger"]),
        ({"whole_again_s": 30.0}, ["30.0 s, limit 20 s"]),
        ({"answers_again_s": 21.0}, ["21.0 s, limit 20 s"]),
        ({"whole_again_s": None}, ["not whole again"]),
        ({"failed": 1}, ["1 requests failed, limit 0"]),
    ],
)
def test_limits_of_a_service_that_recovers(changed: dict[str, Any], expected: list[str]) -> None:
    assert missed(FAULTS["replica"], WHOLE | changed) == expected


@pytest.mark.parametrize("changed", [{"left_behind": ["haproxy"]}, {"ports_left": [8000]}])
def test_limits_of_a_service_that_ends(changed: dict[str, Any]) -> None:
    assert missed(FAULTS["gcs"], GONE) == []
    assert missed(FAULTS["gcs"], GONE | changed) == ["something was left behind"]
    assert missed(FAULTS["gcs"], GONE | {"gone_s": 6.0}) == ["6.0 s, limit 5 s"]


class Answering(BaseHTTPRequestHandler):
    """Answers with the status that the server has."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_the_probe_tells_answers_from_refusals_and_lost_connections() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.status = 200  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def wait_until(is_seen: Any) -> None:
        deadline_s = time.monotonic() + 10
        while not is_seen():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    with Probe(server.server_port) as probe:
        wait_until(probe.answered)
        server.status = 503  # type: ignore[attr-defined]
        wait_until(lambda: any(one.reason.startswith("503") for one in probe.failed(0.0)))
        server.shutdown()
        server.server_close()
        wait_until(lambda: any(one.reason == "ConnectionRefusedError" for one in probe.failed(0.0)))
    assert len({one.id for one in probe.attempts}) == len(probe.attempts)
    assert len(probe.answered()) + len(probe.failed(0.0)) == len(probe.attempts)
