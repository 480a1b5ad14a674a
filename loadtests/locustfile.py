"""A mixed load over HTTP and gRPC, and a table by endpoint, length and plan at its end: `make loadtest`.

Closed loop: a user sends its next request when it has its answer, so latencies are those of `--users` callers at a
time, not of a given arrival rate. One process only: each would have a report of its own. gRPC goes to the host's
port FARSIGHT_GRPC_PORT (9000).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import gevent
import grpc
from grpc.experimental.gevent import init_gevent
from locust import FastHttpUser, User, constant, events, task
from locust.env import Environment

from loadtests.payloads import Payload, Pools, build
from loadtests.report import Outcome, Report, Sample, answered
from service.api.proto import open_inference_grpc_pb2 as pb

SAFETENSORS = "application/x-safetensors"
INFER = "/inference.GRPCInferenceService/ModelInfer"
GRPC_PORT = int(os.environ.get("FARSIGHT_GRPC_PORT", "9000"))
TIMEOUT_S = 300.0  # the service's own default
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

init_gevent()  # before any channel: grpc would otherwise block every other user

# what one run shares; Locust gives user classes no other place
REPORT = Report()
POOLS: Pools = build()
DRAW = random.Random(0)

gevent.get_hub().loop.update_now()  # its clock stood still meanwhile, and --run-time would count those seconds


def pause(sample: Sample, headers: Mapping[str, str]) -> None:
    """A refused caller comes back when the service says; a failed one not at once."""
    if sample.outcome is not Outcome.ANSWERED:
        gevent.sleep(float(headers.get("retry-after", 1)))


class HttpUser(FastHttpUser):
    abstract = True
    wait_time = constant(0)
    network_timeout = TIMEOUT_S
    connection_timeout = TIMEOUT_S

    def send(self, endpoint: str, payload: Payload, headers: dict[str, str]) -> None:
        REPORT.sent += 1
        started_s = time.perf_counter()
        body: Any = payload.body  # Locust's annotation knows no bytes
        with self.client.post(endpoint, data=body, headers=headers, catch_response=True) as response:
            ended_s = time.perf_counter()
            where = (endpoint, payload.length)
            if response.status_code == 200 and response.content:
                sample = answered(*where, started_s, ended_s, response.headers)
            elif response.status_code == 429:
                sample = Sample(*where, Outcome.REFUSED, started_s, ended_s)
            else:
                reason = f"{response.status_code} {response.error or ''} {response.text or ''}"[:200]
                sample = Sample(*where, Outcome.FAILED, started_s, ended_s, reason=reason)
            REPORT.add(sample)
            if sample.outcome is Outcome.FAILED:
                response.failure(sample.reason)
            else:
                response.success()
        pause(sample, response.headers)


class AttentionUser(HttpUser):
    """Tensors of mixed lengths as safetensors."""

    weight = 2

    @task
    def attention(self) -> None:
        headers = {"content-type": SAFETENSORS, "accept": SAFETENSORS}
        self.send("/v1/attention", DRAW.choice(POOLS.attention), headers)


class EmbeddingsUser(HttpUser):
    """Short texts, which long attention requests must not stop."""

    weight = 1

    @task
    def embeddings(self) -> None:
        self.send("/v1/embeddings", DRAW.choice(POOLS.embeddings), {"content-type": "application/json"})


class GrpcUser(User):
    """The tensors of `AttentionUser` as raw contents of ModelInfer."""

    weight = 1
    wait_time = constant(0)

    def on_start(self) -> None:
        host = urlsplit(self.host or "").hostname or "127.0.0.1"
        self.channel = grpc.insecure_channel(f"{host}:{GRPC_PORT}", options=UNLIMITED)
        # bodies are serialized once, in the pool
        self.infer = self.channel.unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)

    def on_stop(self) -> None:
        self.channel.close()

    @task
    def attention(self) -> None:
        payload = DRAW.choice(POOLS.infer)
        REPORT.sent += 1
        started_s = time.perf_counter()
        length, failure = 0, None
        trailing: dict[str, str] = {}
        where = ("grpc ModelInfer", payload.length)
        try:
            response = self.infer(payload.body, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            ended_s = time.perf_counter()
            trailing = {key: str(value) for key, value in error.trailing_metadata() or ()}
            # device memory that ran out has the same code, but no time to come back
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "retry-after" in trailing:
                sample = Sample(*where, Outcome.REFUSED, started_s, ended_s)
            else:
                reason = f"{error.code().name} {error.details()}"[:200]
                sample = Sample(*where, Outcome.FAILED, started_s, ended_s, reason=reason)
        else:
            ended_s = time.perf_counter()
            length = sum(map(len, response.raw_output_contents))
            parameters = {name: value.string_param for name, value in response.parameters.items()}
            sample = answered(*where, started_s, ended_s, parameters)
        REPORT.add(sample)
        if sample.outcome is Outcome.FAILED:
            failure = RuntimeError(sample.reason)
        self.environment.events.request.fire(
            request_type="gRPC",
            name="ModelInfer",
            response_time=1000 * sample.latency_s,
            response_length=length,
            exception=failure,
            context={},
        )
        pause(sample, trailing)


def finish(environment: Environment, **_: object) -> None:
    print(f"\n{REPORT.text()}")
    environment.process_exit_code = REPORT.exit_code


events.quitting.add_listener(finish)  # type: ignore[no-untyped-call]
