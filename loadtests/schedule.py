"""The open loop between Locust's users and a plan: each request is sent when it is due, regardless of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import gevent
from gevent.pool import Group

from loadtests.mix import Planned
from loadtests.samples import Sample, Sent

MAX_IN_FLIGHT = 2000  # per user; further requests fail with that reason
DRAIN_S = 60.0  # after the last arrival


def drive(planned: Sequence[Planned], start_s: float, send: Callable[[Planned, Sent], Sample]) -> list[Sample]:
    """Call `send` in a greenlet for each request at `start_s` + `at_s` (time.perf_counter), and return all samples.

    A late request is sent at once; its latency still counts from when it was due.
    """
    sent: list[Sent | None] = [None] * len(planned)
    found: list[Sample | None] = [None] * len(planned)
    group = Group()

    def now(request: Planned) -> Sent:
        now_s = time.perf_counter() - start_s
        return Sent(request.endpoint, request.length, request.at_s, now_s, request.tenant)

    def send_one(index: int) -> None:
        sent[index] = in_flight = now(planned[index])
        found[index] = send(planned[index], in_flight)

    for index, request in enumerate(planned):
        # a loop, because it may wake early: gevent's clock stands still while others compute
        while (wait_s := start_s + request.at_s - time.perf_counter()) > 0:
            gevent.sleep(wait_s)
        if len(group) < MAX_IN_FLIGHT:
            group.start(gevent.Greenlet(send_one, index))
        else:
            refused = now(request)
            found[index] = refused.failed(refused.sent_s, f"the client had {MAX_IN_FLIGHT} in flight")
    group.join(DRAIN_S)
    ended_s = time.perf_counter() - start_s
    missing = f"no answer {DRAIN_S:g} s after the last request"
    samples = [
        known or (begun or now(request)).failed(ended_s, missing)
        for known, begun, request in zip(found, sent, planned, strict=True)
    ]
    group.kill(block=False)  # a greenlet that waits in grpc ends with its channel
    return samples
