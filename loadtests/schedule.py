"""Requests at their seconds, whatever has become of the others: the open loop, between Locust's users and a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import gevent
from gevent.pool import Group

from loadtests.mix import Planned
from loadtests.samples import Sample, Sent

MOST_IN_FLIGHT = 2000  # of one user; what comes beyond them fails, and says so
DRAIN_S = 60.0  # after the last arrival


def drive(planned: Sequence[Planned], start_s: float, send: Callable[[Planned, Sent], Sample]) -> list[Sample]:
    """Calls `send` in a greenlet for each request at `start_s` + its second (of time.perf_counter), and returns what
    became of all of them. A request that is late is sent at once; its latency still counts from its second."""
    sent: list[Sent | None] = [None] * len(planned)
    found: list[Sample | None] = [None] * len(planned)
    group = Group()

    def now(request: Planned) -> Sent:
        now_s = time.perf_counter() - start_s
        return Sent(request.endpoint, request.length, request.at_s, now_s, request.tenant)

    def one(index: int) -> None:
        sent[index] = this = now(planned[index])
        found[index] = send(planned[index], this)

    for index, request in enumerate(planned):
        # again where it wakes early: gevent's clock stands still while others compute
        while (wait_s := start_s + request.at_s - time.perf_counter()) > 0:
            gevent.sleep(wait_s)
        if len(group) < MOST_IN_FLIGHT:
            group.start(gevent.Greenlet(one, index))
        else:
            this = now(request)
            found[index] = this.failed(this.sent_s, f"the client had {MOST_IN_FLIGHT} in flight")
    group.join(DRAIN_S)
    ended_s = time.perf_counter() - start_s
    missing = f"no answer {DRAIN_S:g} s after the last request"
    samples = [
        known or (begun or now(request)).failed(ended_s, missing)
        for known, begun, request in zip(found, sent, planned, strict=True)
    ]
    group.kill(block=False)  # one that waits in grpc ends with its channel
    return samples
