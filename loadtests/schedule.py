"""Requests at their seconds, whatever has become of the others: the open loop, between Locust's users and a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import gevent
from gevent.pool import Group

from loadtests.mix import Planned
from loadtests.samples import Sample, Sent

MOST_IN_FLIGHT = 2000  # of one user; what comes beyond them fails, and says so
DRAIN_S = 120.0  # after the last arrival


def drive(planned: Sequence[Planned], start_s: float, send: Callable[[Planned, Sent], Sample]) -> list[Sample]:
    """Calls `send` in a greenlet for each request at `start_s` + its second (of time.perf_counter), and returns what
    became of all of them. A request that is late is sent at once; its latency still counts from its second."""
    found: dict[int, Sample] = {}
    group = Group()

    def one(index: int, sent: Sent) -> None:
        found[index] = send(planned[index], sent)

    def sent_now(request: Planned) -> Sent:
        now_s = time.perf_counter() - start_s
        return Sent(request.endpoint, request.length, request.at_s, now_s, request.tenant)

    on_the_way: dict[int, Sent] = {}
    for index, request in enumerate(planned):
        # again where it wakes early: gevent's clock stands still while others compute
        while (wait_s := start_s + request.at_s - time.perf_counter()) > 0:
            gevent.sleep(wait_s)
        on_the_way[index] = sent = sent_now(request)
        if len(group) < MOST_IN_FLIGHT:
            group.start(gevent.Greenlet(one, index, sent))
        else:
            found[index] = sent.failed(sent.sent_s, f"the client had {MOST_IN_FLIGHT} in flight")
    group.join(DRAIN_S)
    ended_s = time.perf_counter() - start_s
    missing = f"no answer {DRAIN_S:g} s after the last request"
    samples = [found.get(index) or on_the_way[index].failed(ended_s, missing) for index in range(len(planned))]
    group.kill()
    return samples
