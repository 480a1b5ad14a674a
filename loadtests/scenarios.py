"""The named load tests: streams, duration, settings of the service, and an event.

Rates are for 2 cores that client and service share; `--scale` multiplies them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loadtests.mix import Endpoint, Stream

EMBEDDINGS = {Endpoint.EMBEDDINGS: 1.0}
TENSORS = {Endpoint.ATTENTION: 1.0, Endpoint.INFER: 1.0}
REPLICAS = {"FARSIGHT_REPLICAS": "2"}
NODES = {"FARSIGHT_REPLICAS": "3", "FARSIGHT_CPU_THREADS": "1"}


def key_of(tenant: str) -> str:
    """API key of a tenant; not a secret: the service is started for a load test and listens on loopback."""
    return f"loadtest-{tenant}"


def tenants(**weights: float) -> str:
    """Value of FARSIGHT_TENANTS for tenants with these weights."""
    hashes = {name: hashlib.sha256(key_of(name).encode()).hexdigest() for name in weights}
    return json.dumps([{"name": name, "key_sha256": [hashes[name]], "weight": weights[name]} for name in weights])


@dataclass(frozen=True, slots=True)
class Scenario:
    """`event` starts after a third of `duration_s`: a replica is killed (-9), all are replaced one by one, or one of
    three nodes (loadtests/nodes.py) is killed or goes silent."""

    about: str
    streams: tuple[Stream, ...]
    duration_s: float = 60.0
    settings: Mapping[str, str] = field(default_factory=dict)  # FARSIGHT_* of the service
    event: Literal["kill", "update", "kill-node", "unplug-node"] | None = None


SCENARIOS = {
    "smoke": Scenario("a light load on everything", (Stream(6.0),)),
    "mixed": Scenario("all endpoints, log-uniform lengths, both transports", (Stream(12.0),), 120.0),
    "chat-and-book": Scenario(
        "bimodal lengths over a day of changing load", (Stream(5.0, TENSORS, "bimodal", "diurnal"),), 120.0
    ),
    "long-beside-short": Scenario(
        "short texts, and every eight seconds attention over 32,768 tokens",
        (
            Stream(15.0, EMBEDDINGS),
            Stream(0.125, {Endpoint.ATTENTION: 1.0}, 32768, "even"),
        ),
    ),
    "burst": Scenario("five times the quiet rate in a quarter of the time", (Stream(12.0, shape="bursts"),)),
    "overload": Scenario(
        "more load than the service can handle",
        (Stream(60.0, TENSORS, "lognormal"),),
        settings={"FARSIGHT_MAX_QUEUE_S": "1"},
    ),
    "soak": Scenario("half an hour, with growth of memory", (Stream(8.0, lengths="lognormal"),), 1800.0),
    "tenants": Scenario(
        "one tenant asks for more than the capacity, another of equal weight for little",
        (
            Stream(30.0, TENSORS, "lognormal", tenant="greedy"),
            Stream(4.0, EMBEDDINGS, tenant="modest"),
            Stream(2.0, TENSORS, 512, tenant="modest"),
        ),
        settings={"FARSIGHT_TENANTS": tenants(greedy=1.0, modest=1.0), "FARSIGHT_MAX_QUEUE_S": "10"},
    ),
    "rolling-update": Scenario("two replicas are replaced under load", (Stream(6.0),), 90.0, REPLICAS, "update"),
    "chaos": Scenario("one of two replicas is killed (-9)", (Stream(10.0),), settings=REPLICAS, event="kill"),
    # as root: three nodes on this machine, each with a replica and its own network
    "node-killed": Scenario("one of three nodes is killed (-9)", (Stream(10.0),), 90.0, NODES, "kill-node"),
    "node-lost": Scenario("one of three nodes goes silent", (Stream(10.0),), 150.0, NODES, "unplug-node"),
}
