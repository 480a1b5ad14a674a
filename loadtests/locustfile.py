"""Sends the requests of a scenario over HTTP and gRPC in an open loop; `python -m loadtests` runs it as a process.

Locust's users are closed loops: a user that waits for an answer sends nothing. Here there is one user for each
transport, and its only task starts a greenlet for every request when it is due (`schedule`). Locust's events receive
latencies from these times, and `--samples` all of them unrounded.
"""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import grpc
from gevent.event import Event
from grpc.experimental.gevent import init_gevent
from locust import FastHttpUser, User, events, task
from locust.env import Environment

from loadtests import samples
from loadtests.mix import Endpoint, Planned, plan, plan_of
from loadtests.payloads import HEADS, TRACE_HEADS, Bodies, build
from loadtests.samples import Outcome, Sample, Sent
from loadtests.scenarios import SCENARIOS, key_of
from loadtests.schedule import MAX_IN_FLIGHT, drive
from service.api.proto import open_inference_grpc_pb2 as pb

SAFETENSORS = "application/x-safetensors"
HEADERS = {
    Endpoint.ATTENTION: {"content-type": SAFETENSORS, "accept": SAFETENSORS},
    Endpoint.EMBEDDINGS: {"content-type": "application/json"},
}
USERS = 2
INFER = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 300.0  # the service's own default
CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

init_gevent()  # before any channel is created: otherwise grpc blocks all other greenlets


class Run:
    """State shared by the two users; Locust offers user classes no other place for it."""

    options: Namespace
    planned: list[Planned]
    bodies: Bodies

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.started = Event()
        self.samples: list[Sample] = []
        self.warm = self.done = 0  # number of users

    def begin(self) -> None:
        self.start_s = time.perf_counter() + 0.5
        if self.options.started:
            self.options.started.write_text(f"{self.start_s}")
        self.started.set()

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s


RUN = Run()


class OpenLoop(User):
    """Sends the requests of its transport."""

    abstract = True
    fixed_count = 1
    endpoints: tuple[Endpoint, ...] = ()

    @task
    def arrivals(self) -> None:
        mine = [planned for planned in RUN.planned if planned.endpoint in self.endpoints]
        for planned in warm_up(mine):
            self.send(planned, Sent(planned.endpoint, planned.length, 0.0, 0.0, planned.tenant))
        RUN.warm += 1
        if RUN.warm == USERS:
            RUN.begin()
        RUN.started.wait()
        RUN.samples += drive(mine, RUN.start_s, self.send)
        RUN.done += 1
        if RUN.done == USERS:
            gevent.spawn(self.environment.runner.quit)  # in another greenlet: quit ends this user first
        Event().wait()  # until Locust ends the user; otherwise the task would run again

    def send(self, planned: Planned, sent: Sent) -> Sample:
        raise NotImplementedError


class HttpUser(OpenLoop, FastHttpUser):
    endpoints = (Endpoint.ATTENTION, Endpoint.EMBEDDINGS)
    concurrency = MAX_IN_FLIGHT
    network_timeout = TIMEOUT_S
    connection_timeout = TIMEOUT_S
    max_retries = 0

    def send(self, planned: Planned, sent: Sent) -> Sample:
        body: Any = RUN.bodies[planned.endpoint, planned.length]  # Locust's annotation lacks bytes
        headers = dict(HEADERS[planned.endpoint])
        if planned.tenant:
            headers["authorization"] = f"Bearer {key_of(planned.tenant)}"
        with self.client.post(f"/v1/{planned.endpoint}", data=body, headers=headers, catch_response=True) as response:
            ended_s = RUN.now_s()
            error = response.request_meta["exception"]  # of the connection, the status or the body
            if error is None and response.content:
                sample = sent.answered(ended_s, response.headers)
            elif response.status_code == 429:
                sample = sent.refused(ended_s)
            else:
                text = response.text if response.status_code >= 400 else ""
                sample = sent.failed(ended_s, f"{response.status_code} {error!r} {text}"[:200])
            response.request_meta["response_time"] = 1000 * sample.latency_s
            if sample.outcome is Outcome.FAILED:
                response.failure(sample.reason)
            else:
                response.success()
        return sample


class GrpcUser(OpenLoop):
    endpoints = (Endpoint.INFER,)

    def on_start(self) -> None:
        host = urlsplit(self.host or "").hostname or "127.0.0.1"
        self.channel = grpc.insecure_channel(f"{host}:{RUN.options.grpc_port}", options=CHANNEL)
        # bodies are serialized before the run
        self.infer: Any = self.channel.unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)

    def on_stop(self) -> None:
        self.channel.close()

    def send(self, planned: Planned, sent: Sent) -> Sample:
        metadata = [("authorization", f"Bearer {key_of(planned.tenant)}")] if planned.tenant else []
        size = 0
        try:
            # as a future: a plain call would occupy one of gevent's ten threads until it is answered
            call = self.infer.future(RUN.bodies[planned.endpoint, planned.length], timeout=TIMEOUT_S, metadata=metadata)
            response = call.result()
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            # out of device memory has the same code, but no retry-after
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in trailing:
                sample = sent.refused(RUN.now_s())
            else:
                sample = sent.failed(RUN.now_s(), f"{error.code().name} {error.details()}"[:200])
        else:
            ended_s = RUN.now_s()
            size = sum(map(len, response.raw_output_contents))
            sample = sent.answered(ended_s, {name: value.string_param for name, value in response.parameters.items()})
        self.environment.events.request.fire(
            request_type="gRPC",
            name=sample.endpoint,
            response_time=1000 * sample.latency_s,
            response_length=size,
            exception=RuntimeError(sample.reason) if sample.outcome is Outcome.FAILED else None,
            context={},
        )
        return sample


def warm_up(planned: list[Planned]) -> list[Planned]:
    """Requests that warm up service and connections: the shortest, the middle and the longest of each endpoint."""
    found = []
    for endpoint in Endpoint:
        by_length = sorted(
            (request for request in planned if request.endpoint is endpoint), key=lambda request: request.length
        )
        found += [by_length[index] for index in sorted({0, len(by_length) // 2, len(by_length) - 1}) if by_length]
    return found


def _options(parser: Any) -> None:
    group = parser.add_argument_group("Farsight")
    group.add_argument("--scenario", choices=list(SCENARIOS), default="smoke")
    group.add_argument("--duration", type=float, help="Seconds; default: those of the scenario.")
    group.add_argument("--scale", type=float, default=1.0, help="Factor for the rates of the scenario.")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--trace", type=Path, help="CSV of `farsight simulate`, instead of the scenario's streams.")
    group.add_argument("--grpc-port", type=int, default=9000)
    group.add_argument("--samples", type=Path, help="File for the samples, as NDJSON.")
    group.add_argument("--started", type=Path, help="File that receives time.perf_counter of the start of the run.")
    parser.set_defaults(headless=True, num_users=USERS, spawn_rate=USERS)


def _prepare(environment: Environment, **_: object) -> None:
    options = environment.parsed_options
    assert options is not None, "bug: run as a library"
    RUN.options = options
    scenario = SCENARIOS[options.scenario]
    duration_s = options.duration or scenario.duration_s
    if options.trace:
        RUN.planned = plan_of(options.trace, duration_s, options.scale)
    else:
        RUN.planned = plan(scenario.streams, duration_s, options.seed, options.scale)
    RUN.bodies = build(RUN.planned, options.seed, heads=TRACE_HEADS if options.trace else HEADS)
    gc.freeze()  # the bodies live until the end: the collector can skip them


def _finish(environment: Environment, **_: object) -> None:
    RUN.samples.sort(key=lambda sample: sample.at_s)
    if RUN.options.samples:
        samples.write(RUN.options.samples, RUN.samples)
    environment.process_exit_code = 0  # the reader of the samples checks the thresholds


for event, listener in (
    (events.init_command_line_parser, _options),
    (events.init, _prepare),
    (events.quitting, _finish),
):
    event.add_listener(listener)  # type: ignore[no-untyped-call]
