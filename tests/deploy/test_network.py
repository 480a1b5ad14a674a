"""Who may reach which port of a head or a worker, by the NetworkPolicies of each overlay."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config
from tests.deploy.kinds import groups
from tests.deploy.rendered import OVERLAYS, of_kind, only

Json = dict[str, Any]

CONFIG = Config()
HTTP, GRPC = CONFIG.http_port, CONFIG.grpc_port
METRICS, HAPROXY, STATS = CONFIG.metrics_port, CONFIG.haproxy_metrics_port, CONFIG.haproxy_stats_port
DASHBOARD, RAY_METRICS, PLAIN = 8265, 8080, 80
# GCS, object manager, agents, Ray's client, workers, replicas behind HAProxy (HTTP and gRPC)
INTERNAL = {6379, 8076, 52365, 10001, 10002, 19999, 30000, 40000}
PORTS = {HTTP, GRPC, METRICS, HAPROXY, STATS, DASHBOARD, RAY_METRICS, PLAIN} | INTERNAL

OTHERS = {
    "pod of another application": ("here", {"app.kubernetes.io/name": "shop"}),
    "pod of another namespace": ("shop", {"app.kubernetes.io/part-of": "farsight"}),
    "gateway of another team": ("here", {"gateway.networking.k8s.io/gateway-name": "shop"}),
    "pod beside Prometheus": ("monitoring", {"app.kubernetes.io/name": "grafana"}),
    "Prometheus of another namespace": ("shop", {"app.kubernetes.io/name": "prometheus"}),
    "outside": (None, {}),
}


def matches(selector: Json, labels: dict[str, str]) -> bool:
    """A label selector; those operators that are used here."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def lets_in(peer: Json, here: str, namespace: str | None, labels: dict[str, str]) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    if namespace is None:  # no pod of this cluster
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != here:
        return False
    return matches(peer.get("podSelector", {}), labels)


def reached(policies: list[Json], target: dict[str, str], namespace: str | None, labels: dict[str, str]) -> set[int]:
    """Ports of PORTS that a pod with these labels reaches on the pod `target`.

    Policies add up; a pod that none selects is open. Ref: kubernetes.io, Network Policies.
    """
    here = policies[0]["metadata"]["namespace"]
    selecting = [p["spec"] for p in policies if matches(p["spec"]["podSelector"], target)]
    selecting = [spec for spec in selecting if "Ingress" in spec["policyTypes"]]
    if not selecting:
        return PORTS
    found: set[int] = set()
    for rule in (rule for spec in selecting for rule in spec.get("ingress", ())):
        peers = rule.get("from")
        if peers and not any(lets_in(peer, here, here if namespace == "here" else namespace, labels) for peer in peers):
            continue
        ports = rule.get("ports")
        assert all(port["protocol"] == "TCP" for port in ports or ())
        found |= PORTS & {port["port"] for port in ports} if ports else PORTS
    return found


def pods(overlay: str) -> tuple[dict[str, str], dict[str, str]]:
    head, workers = (group["template"]["metadata"]["labels"] for group in groups(only(overlay, "RayService")))
    return head, workers


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_reaches_itself(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    for target in pods(overlay):
        for peer in pods(overlay):
            assert reached(policies, target, "here", peer) == PORTS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gateways_reach_the_service_on_workers_and_nothing_else(overlay: str) -> None:
    policies, (head, worker) = of_kind(overlay, "NetworkPolicy"), pods(overlay)
    for name in ("farsight-front", "farsight-gateway"):
        gateway = {"gateway.networking.k8s.io/gateway-name": name}
        assert reached(policies, worker, "here", gateway) == {HTTP, GRPC}
        assert reached(policies, head, "here", gateway) == set()
        assert reached(policies, worker, "shop", gateway) == set()


def test_only_the_gateway_with_tls_reaches_the_one_without() -> None:
    """KubeRay makes it for upgrades in steps: plain HTTP, and a load balancer of its own."""
    policies = of_kind("prod", "NetworkPolicy")
    name = "gateway.networking.k8s.io/gateway-name"
    inner, front = ({name: value} for value in ("farsight-gateway", "farsight-front"))
    assert reached(policies, inner, "here", front) == {PLAIN}
    for namespace, labels in (*OTHERS.values(), ("shop", front)):
        assert reached(policies, inner, namespace, labels) == set()
    assert reached(of_kind("gpu", "NetworkPolicy"), inner, None, {}) == PORTS  # which is why it needs one


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_monitor_reaches_metrics_and_nothing_else(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    for target in pods(overlay):
        assert reached(policies, target, "monitoring", prometheus) == {METRICS, HAPROXY, RAY_METRICS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_reaches_the_dashboard_of_the_head_and_nothing_else(overlay: str) -> None:
    policies, (head, worker) = of_kind(overlay, "NetworkPolicy"), pods(overlay)
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert reached(policies, head, "ray-system", operator) == {DASHBOARD}
    assert reached(policies, worker, "ray-system", operator) == set()


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("other", OTHERS)
def test_others_reach_nothing(overlay: str, other: str) -> None:
    namespace, labels = OTHERS[other]
    for target in pods(overlay):
        assert reached(of_kind(overlay, "NetworkPolicy"), target, namespace, labels) == set()


def test_a_pod_that_no_policy_selects_would_be_seen() -> None:
    """The reading of the policies itself: it tells open from closed."""
    policies, (head, _) = of_kind("base", "NetworkPolicy"), pods("base")
    without = [p for p in policies if not matches(p["spec"]["podSelector"], head)]
    assert without
    assert reached(without, head, None, {}) == PORTS
    opened = [
        {**policies[0], "spec": {**policies[0]["spec"], "ingress": [{"ports": [{"protocol": "TCP", "port": STATS}]}]}}
    ]
    assert reached(opened, head, None, {}) == {STATS}


@pytest.mark.parametrize("overlay", ["gpu", "mig", "prod"])
def test_policies_and_gateway_mean_the_same_names(overlay: str) -> None:
    front = only(overlay, "Gateway")["metadata"]["name"]
    made_by_kuberay = f"{only(overlay, 'RayService')['metadata']['name']}-gateway"
    [expression] = only(overlay, "NetworkPolicy", "gateway")["spec"]["ingress"][0]["from"][0]["podSelector"][
        "matchExpressions"
    ]
    assert expression["values"] == [front, made_by_kuberay]
