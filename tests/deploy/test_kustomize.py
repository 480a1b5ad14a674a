"""Every overlay renders, and is valid for Kubernetes, KubeRay, the Gateway API and the Prometheus Operator."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from service.billing.tenants import TENANTS, Tenants
from service.cluster.environment import ray_environment
from service.config import Config
from tests.deploy import kinds
from tests.deploy.rendered import OVERLAYS, documents, kustomize, objects, of_kind, only, tool
from tests.deploy.test_serve_config import unknown_keys

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
EXAMPLE = DEPLOY / "kustomize/secrets.example.yaml"
PLACEHOLDER = "PUT-THE-"

Json = dict[str, Any]


def setting_errors(found: Json) -> list[str]:
    """Names in the environment's ConfigMap that are read nowhere."""
    known = {f"FARSIGHT_{name.upper()}" for name in Config.model_fields} | ray_environment(Config()).keys()
    return [f"{name} is no setting" for name in found["data"] if name not in known]


def all_errors(found: Json) -> list[str]:
    wrong = kinds.errors(found)
    if found["kind"] == "ConfigMap" and found["metadata"]["name"].startswith("environment"):
        wrong += setting_errors(found)
    if found["kind"] == "RayService":
        config = yaml.safe_load(found["spec"]["serveConfigV2"])
        ServeDeploySchema.model_validate(config)
        wrong += unknown_keys(ServeDeploySchema, config)
    return [f"{found['kind']} {found['metadata']['name']}: {error}" for error in wrong]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    assert [error for found in objects(overlay) for error in all_errors(found)] == []


def test_a_rayservice_is_checked_against_kuberay() -> None:
    if not kinds.DEFINITION.exists():
        pytest.skip(f"KubeRay's definition is not at {kinds.DEFINITION}")
    assert kinds.errors({**only("base", "RayService"), "spek": {}}) == [
        "$: Additional properties are not allowed ('spek' was unexpected)"
    ]


def test_a_kind_that_nobody_knows_is_not_valid() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kinds.errors({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}})


TYPOS = [
    ("base/namespace.yaml", "labels:", "label:", "'label' was unexpected"),
    ("base/service.yaml", "appProtocol:", "appProtocoll:", "'appProtocoll' was unexpected"),
    ("base/network.yaml", "policyTypes:", "policyType:", "'policyType' was unexpected"),
    ("base/disruption.yaml", "minAvailable: 0", "minAvailabel: 0", "'minAvailabel' was unexpected"),
    ("base/priority.yaml", "value:", "valeu:", "'value' is a required property"),
    ("base/environment.env", "FARSIGHT_DEVICE", "FARSIGHT_DEVISE", "FARSIGHT_DEVISE is no setting"),
    ("base/environment.env", "RAY_SERVE_ENABLE", "RAY_SERVE_ENABEL", "RAY_SERVE_ENABEL_HA_PROXY is no setting"),
    ("base/rayservice.yaml", "enableServiceLinks", "enableServicesLinks", "'enableServicesLinks' was unexpected"),
    ("base/rayservice.yaml", "containerPort: 9464", "containerPort: farsight", "is not of type 'integer'"),
    ("base/serve-config.yaml", "grpc_servicer_functions", "grpc_servicers", "grpc_options.grpc_servicers"),
    ("base/references.yaml", "nameReference", "nameReferences", "nameReferences"),
    ("base/kustomization.yaml", "configMapGenerator", "configMapGenerators", "configMapGenerators"),
    ("components/accounts/kustomization.yaml", "behavior", "behaviour", "behaviour"),
    ("components/accounts/secrets.yaml", "readOnly:", "readonly:", "'readonly' was unexpected"),
    ("components/gateway/gateway.yaml", "certificateRefs", "certificateRef", "'certificateRef' was unexpected"),
    ("components/gateway/routes.yaml", "3600s", "3600 s", "does not match"),
    ("components/gateway/routes.yaml", "port: 9000", "prot: 9000", "'port' is a required property"),
    ("overlays/gpu/workers.yaml", "volumes/2", "volumes/9", "volumes/9"),
    ("overlays/prod/kustomization.yaml", "MAX_REPLICAS", "MAX_REPLICA", "FARSIGHT_MAX_REPLICA is no setting"),
    ("overlays/prod/network.yaml", "protocol:", "protocoll:", "'protocoll' was unexpected"),
    ("overlays/prod/rayservice.yaml", "idleTimeoutSeconds", "idleTimeoutSecond", "'idleTimeoutSecond' was unexpected"),
    ("../monitoring/podmonitors.yaml", "relabelings", "relabellings", "'relabellings' was unexpected"),
    ("../monitoring/prometheusrule.yaml", "annotations:", "anotations:", "'anotations' was unexpected"),
]
OF_KUBERAY = {"idleTimeoutSecond"}


@pytest.mark.parametrize(("file", "old", "new", "message"), TYPOS)
def test_a_planted_typo_is_found(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    """In files of every kind: by Kustomize, or in what it renders."""
    if new in OF_KUBERAY and kinds.rayservice_schema() is None:
        pytest.skip(f"KubeRay's definition is not at {kinds.DEFINITION}")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    target = tmp_path / "deploy/kustomize" / file
    assert old in target.read_text()
    target.write_text(target.read_text().replace(old, new, 1))
    result = kustomize(tmp_path / "deploy/kustomize/overlays/prod")
    if result.returncode:
        assert message in result.stderr
        return
    wrong = [error for found in documents(result.stdout) for error in all_errors(found)]
    assert message in "\n".join(wrong)


def test_a_missing_tool_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"scripts/kubectl\.sh"):
        tool("no-such-tool", "scripts/kubectl.sh")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"scripts/kubectl\.sh"):
        tool("no-such-tool", "scripts/kubectl.sh")


def test_what_is_generated_is_current() -> None:
    generated = runpy.run_path(str(ROOT / "scripts/manifests.py"))["manifests"]()
    assert len(generated) == 2
    for path, text in generated.items():
        assert path.read_text() == text, f"{path}: `make manifests`"


def test_every_folder_is_reached_from_an_overlay() -> None:
    """A file that no kustomization includes would not be tested."""
    named = set()
    for path in DEPLOY.rglob("kustomization.yaml"):
        for word in path.read_text().replace("[", " ").replace("]", " ").split():
            named.add((path.parent / word).resolve())
    loose = {path for path in (DEPLOY / "kustomize").rglob("*") if path.is_file()} - named - {EXAMPLE}
    assert {path for path in loose if path.name != "kustomization.yaml"} == set()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_share_one_namespace_that_is_restricted(overlay: str) -> None:
    space = only(overlay, "Namespace")["metadata"]
    assert space["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    cluster_wide = {"Namespace", "PriorityClass"}
    spaces = {found["metadata"].get("namespace") for found in objects(overlay) if found["kind"] not in cluster_wide}
    assert spaces == {space["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select_the_pods_that_they_mean(overlay: str) -> None:
    head, workers = (group["template"]["metadata"]["labels"] for group in kinds.groups(only(overlay, "RayService")))

    def selected(selector: Json) -> tuple[bool, bool]:
        return tuple(selector["matchLabels"].items() <= labels.items() for labels in (head, workers))

    for name, expected in (("head", (True, False)), ("workers", (False, True))):
        assert selected(only(overlay, "PodDisruptionBudget", name)["spec"]["selector"]) == expected
    assert selected({"matchLabels": only(overlay, "Service")["spec"]["selector"]}) == (False, True)
    for monitor in of_kind(overlay, "PodMonitor"):
        assert selected(monitor["spec"]["selector"]) == (False, True)
    _, group = kinds.groups(only(overlay, "RayService"))
    for constraint in group["template"]["spec"]["topologySpreadConstraints"]:
        assert selected(constraint["labelSelector"]) == (False, True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_drain_takes_one_worker_and_the_head_only_where_it_may_be_lost(overlay: str) -> None:
    """RayCluster has no scale subresource, so that `maxUnavailable` and shares would forbid every eviction."""
    workers, head = (only(overlay, "PodDisruptionBudget", name)["spec"] for name in ("workers", "head"))
    assert workers.keys() == head.keys() == {"selector", "minAvailable"}
    least = int(next(iter(of_kind(overlay, "ConfigMap")))["data"]["FARSIGHT_REPLICAS"])
    assert workers["minAvailable"] == least - 1
    cluster = only(overlay, "RayService")["spec"]["rayClusterConfig"]
    may_be_lost = "gcsFaultToleranceOptions" in cluster
    heads_in_an_upgrade = 2
    assert head["minAvailable"] == (0 if may_be_lost else heads_in_an_upgrade + 1)
    assert may_be_lost == (overlay == "prod")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_priority_classes_exist_and_the_head_comes_first(overlay: str) -> None:
    values = {found["metadata"]["name"]: found["value"] for found in of_kind(overlay, "PriorityClass")}
    head, workers = (
        values[group["template"]["spec"]["priorityClassName"]] for group in kinds.groups(only(overlay, "RayService"))
    )
    assert head > workers > 0


@pytest.mark.parametrize("overlay", ["gpu", "mig", "prod"])
def test_routes_lead_from_listeners_with_tls_to_services(overlay: str) -> None:
    gateway = only(overlay, "Gateway")
    listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
    assert {listener["protocol"] for listener in listeners.values()} == {"HTTPS"}
    assert all(listener["tls"]["certificateRefs"][0]["name"] == "farsight-tls" for listener in listeners.values())
    name = only(overlay, "RayService")["metadata"]["name"]
    grpc = only(overlay, "Service")
    services = {(grpc["metadata"]["name"], port["port"]) for port in grpc["spec"]["ports"]}
    assert grpc["spec"]["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    # an incremental upgrade moves traffic behind the Gateway that KubeRay makes: <name>-gateway, port 80
    services.add((f"{name}-gateway-istio", 80) if overlay == "prod" else (f"{name}-serve-svc", Config().http_port))
    used = set()
    for kind in ("HTTPRoute", "GRPCRoute"):
        route = only(overlay, kind)["spec"]
        [parent], [rule] = route["parentRefs"], route["rules"]
        assert parent["name"] == gateway["metadata"]["name"] != f"{name}-gateway"
        assert route["hostnames"] == [
            listeners.pop(parent["sectionName"])["hostname"]
        ]  # one kind of route per listener
        used |= {(backend["name"], backend["port"]) for backend in rule["backendRefs"]}
    assert used == services
    request = only(overlay, "HTTPRoute")["spec"]["rules"][0]["timeouts"]["request"]
    assert int(request.removesuffix("s")) > Config().default_timeout_s


def test_an_upgrade_in_steps_uses_the_class_of_our_gateway() -> None:
    upgrade = only("prod", "RayService")["spec"]["upgradeStrategy"]
    options = upgrade["clusterUpgradeOptions"]
    assert upgrade["type"] == "NewClusterWithIncrementalUpgrade"
    assert options["gatewayClassName"] == only("prod", "Gateway")["spec"]["gatewayClassName"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100


@pytest.fixture(scope="module")
def secrets() -> dict[str, Json]:
    return {document["metadata"]["name"]: document for document in yaml.safe_load_all(EXAMPLE.read_text())}


def test_the_example_has_every_secret_that_is_asked_for(secrets: dict[str, Json]) -> None:
    assert [error for secret in secrets.values() for error in kinds.errors(secret)] == []
    text = json.dumps(objects("prod"))
    for name, secret in secrets.items():
        assert f'"{name}"' in text
        assert secret["metadata"]["namespace"] == "farsight"
        assert all(PLACEHOLDER in value for value in secret["stringData"].values())
    for overlay in OVERLAYS:
        assert not of_kind(overlay, "Secret")


def test_a_typo_in_the_example_is_found() -> None:
    wrong = yaml.safe_load(EXAMPLE.read_text().partition("---")[0].replace("stringData", "stringDate"))
    assert kinds.errors(wrong) == [": Additional properties are not allowed ('stringDate' was unexpected)"]


def test_the_example_s_keys_keep_the_service_from_starting(secrets: dict[str, Json], tmp_path: Path) -> None:
    text = secrets["farsight-tenants"]["stringData"]["tenants.json"]
    with pytest.raises(pydantic.ValidationError, match="key_sha256"):
        TENANTS.validate_json(text)
    file = tmp_path / "tenants.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="key_sha256"):
        Tenants(Config(tenants_file=file))
    rows = json.loads(text)
    for row in rows:
        row["key_sha256"] = ["ab" * 32]
    TENANTS.validate_python(rows)  # the hashes are all that is wrong with it
