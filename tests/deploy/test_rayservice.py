"""deploy/rayservice.yaml: valid for KubeRay's own definition, and in agreement with serve.yaml, image and service."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.app import build
from service.cli import ray_environment
from service.config import Config

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT.parent / "shared/kuberay/ray.io_rayservices.yaml"
DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"  # on one machine nobody else must learn of it

Json = dict[str, Any]


def strict(schema: Any) -> Any:
    """An openAPIV3Schema of Kubernetes as a JSON schema that refuses what the API server would drop."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    kept = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "default"}
    if "properties" in kept:
        # a property may be named like a keyword: its name is no schema
        kept["properties"] = {name: strict(inner) for name, inner in kept["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
        if key in kept:
            kept[key] = strict(kept[key])
    return kept


def with_defaults(schema: Json, value: Any) -> Any:
    """What the API server stores before it validates."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, inner in schema.get("properties", {}).items():
        if name not in filled and "default" in inner:
            filled[name] = copy.deepcopy(inner["default"])
        if name in filled:
            filled[name] = with_defaults(inner, filled[name])
    return filled


@pytest.fixture(scope="module")
def schema() -> Json:
    if not DEFINITION.exists():
        pytest.skip(f"KubeRay's definition is not at {DEFINITION}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1 MB: 15 s in pure Python
    definition = yaml.load(DEFINITION.read_text(), Loader=loader)
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    whole = version["schema"]["openAPIV3Schema"]
    # the definition says only `object`; these are the parts of ObjectMeta that a manifest writes
    words = {"type": "object", "additionalProperties": {"type": "string"}}
    whole["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            "namespace": {"type": "string"},
            "labels": words,
            "annotations": words,
        },
    }
    return whole


@pytest.fixture(scope="module")
def validator(schema: Json) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict(schema))


@pytest.fixture(scope="module")
def manifest() -> Json:
    return yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())


@pytest.fixture(scope="module")
def args(manifest: Json) -> Json:
    [application] = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    return application["args"]


def errors(validator: jsonschema.Draft202012Validator, schema: Json, manifest: Json) -> list[str]:
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(with_defaults(schema, manifest))]


def groups(manifest: Json) -> tuple[Json, Json]:
    cluster = manifest["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def pod(group: Json) -> Json:
    return group["template"]["spec"]


def container(group: Json) -> Json:
    [only] = pod(group)["containers"]
    return only


def environment(group: Json) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(group)["env"]}


def test_kuberay_accepts_it(validator: jsonschema.Draft202012Validator, schema: Json, manifest: Json) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert errors(validator, schema, manifest) == []


def planted(manifest: Json) -> list[tuple[str, Json]]:
    """Mistakes, each with a part of the message that must name it."""
    several = [(message, copy.deepcopy(manifest)) for message in ("serveConfigv2", "minReplicas", "terminat", "name")]
    several[0][1]["spec"]["serveConfigv2"] = ""
    several[1][1]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "one"
    pod(groups(several[2][1])[1])["terminationGracePeriodSecond"] = 1
    several[3][1]["metadata"]["name"] = "f" * 48
    return several


def test_a_typo_and_a_wrong_type_are_found(
    validator: jsonschema.Draft202012Validator, schema: Json, manifest: Json
) -> None:
    for message, wrong in planted(manifest):
        found = errors(validator, schema, wrong)
        assert len(found) == 1, message
        assert message in found[0]


def test_it_carries_serve_yaml(manifest: Json) -> None:
    carried = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert carried == yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())


def test_ray_is_the_pinned_one(manifest: Json) -> None:
    pin = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == pin[1]


def test_head_and_workers_run_the_image_with_one_environment(manifest: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", raising=False)
    head, workers = groups(manifest)
    assert environment(head) == environment(workers)
    assert container(head)["image"] == container(workers)["image"] == "farsight:cpu"
    assert "--tag farsight:cpu" in (ROOT / "Makefile").read_text()
    service, ours = ray_environment(Config()), environment(head)
    assert {"RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY", DRAINING} <= ours.keys() <= service.keys()
    image = next(iter((ROOT / "Dockerfile").read_text().split("FROM base AS final")[1:]))
    assert ours.keys() - {DRAINING} == set(re.findall(r"\b(RAY_\w+)=", image))
    different = {name for name in ours if ours[name] != service[name]}
    assert different == {DRAINING}


def test_the_head_does_no_work_and_a_worker_is_one_device(manifest: Json, args: Json) -> None:
    head, workers = groups(manifest)
    assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["rayStartParams"]["num-cpus"] == "1"
    assert workers["minReplicas"] <= args["replicas"] <= workers["replicas"] <= workers["maxReplicas"]
    resources = container(workers)["resources"]
    assert str(args["cpu_threads"]) == resources["limits"]["cpu"] == resources["requests"]["cpu"]


def test_ports_are_those_of_the_service(manifest: Json, args: Json) -> None:
    config = Config.model_validate(args)
    _, workers = groups(manifest)
    ports = {port["name"]: port["containerPort"] for port in container(workers)["ports"]}
    assert ports["serve"] == config.http_port
    assert ports["serve-grpc"] == config.grpc_port
    assert ports["farsight"] == config.metrics_port
    assert ports["haproxy"] == config.haproxy_metrics_port
    assert config.metrics_host == "0.0.0.0"


def test_pods_meet_the_restricted_standard(manifest: Json) -> None:
    for group in groups(manifest):
        assert pod(group)["securityContext"]["runAsNonRoot"] is True
        assert pod(group)["securityContext"]["runAsUser"] == 1000
        assert pod(group)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod(group)["automountServiceAccountToken"] is False
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_shared_memory_is_memory_and_mounted(manifest: Json) -> None:
    for group in groups(manifest):
        [volume] = pod(group)["volumes"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": volume["name"], "mountPath": "/dev/shm"} in container(group)["volumeMounts"]


def test_probes_need_only_what_the_image_has(manifest: Json, args: Json) -> None:
    head, workers = groups(manifest)
    for group in (head, workers):
        for probe in ("livenessProbe", "readinessProbe"):
            shell, flag, command = container(group)[probe]["exec"]["command"]
            assert (shell, flag) == ("bash", "-c")
            assert {part.split()[0] for part in re.split(r"&&|\|", command)} == {"wget", "grep"}
    port = Config.model_validate(args).http_port
    assert f"localhost:{port}/-/healthz" in container(workers)["readinessProbe"]["exec"]["command"][2]
    assert container(workers)["readinessProbe"]["failureThreshold"] == 1


def test_a_pod_outlives_its_replica_s_shutdown_and_the_draining(manifest: Json, args: Json, tmp_path: Path) -> None:
    application = build(Config.model_validate({**args, "state_dir": tmp_path}))
    shutdown_s = application._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    _, workers = groups(manifest)
    hard_stop_s = 120  # Ray's RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
    needed_s = shutdown_s + float(environment(workers)[DRAINING]) + hard_stop_s
    assert pod(workers)["terminationGracePeriodSeconds"] > needed_s
