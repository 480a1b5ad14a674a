"""The RayService of every overlay, in agreement with serve.yaml, the image and the service."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from service.cluster.deployment import build
from service.cluster.environment import ray_environment
from service.config import Config
from tests.deploy import kinds
from tests.deploy.kinds import groups
from tests.deploy.rendered import OVERLAYS, of_kind, only

ROOT = Path(__file__).parents[2]
DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"  # not needed on one machine
GPUS = {"gpu": "nvidia.com/gpu", "mig": "nvidia.com/mig-1g.10gb", "prod": "nvidia.com/gpu"}

# Ray tells it of what service/cluster/deployment.py sets with max_replicas
pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")

Json = dict[str, Any]


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def manifest(overlay: str) -> Json:
    return only(overlay, "RayService")


@pytest.fixture
def config(overlay: str, manifest: Json, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """As Ray's builder makes it on a node: of the Serve configuration and the node's environment."""
    for group in groups(manifest):
        for name, value in environment(overlay, group).items():
            if name.startswith("FARSIGHT_"):
                monkeypatch.setenv(name, value)
    application = call_user_app_builder_with_args_if_necessary(build, {**args(manifest), "state_dir": str(tmp_path)})
    config, _ = application._bound_deployment.init_args
    return config


def args(manifest: Json) -> Json:
    [application] = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    return application["args"]


def pod(group: Json) -> Json:
    return group["template"]["spec"]


def container(group: Json) -> Json:
    [only_one] = pod(group)["containers"]
    return only_one


def environment(overlay: str, group: Json) -> dict[str, str]:
    """All that is not secret."""
    found: dict[str, str] = {}
    for source in container(group)["envFrom"]:
        found |= only(overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {entry["name"]: entry["value"] for entry in container(group)["env"] if "value" in entry}


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()
    return int(number) / {"Gi": 1, "Mi": 1024}[unit]


def with_a_typo(manifest: Json) -> list[tuple[str, Json]]:
    """Mistakes, each with a part of the message that must name it."""
    several = [(message, copy.deepcopy(manifest)) for message in ("serveConfigv2", "minReplicas", "terminat", "name")]
    several[0][1]["spec"]["serveConfigv2"] = ""
    several[1][1]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "one"
    pod(groups(several[2][1])[1])["terminationGracePeriodSecond"] = 1
    several[3][1]["metadata"]["name"] = "f" * 48
    return several


def test_kuberay_finds_a_typo_and_a_wrong_type(manifest: Json) -> None:
    if kinds.rayservice_schema() is None:
        pytest.skip(f"KubeRay's definition is not at {kinds.DEFINITION}")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    for message, wrong in with_a_typo(manifest):
        found = kinds.errors(wrong)
        assert len(found) == 1, message
        assert message in found[0]


def test_it_carries_serve_yaml(manifest: Json) -> None:
    assert manifest["spec"]["serveConfigV2"] == (ROOT / "deploy/serve.yaml").read_text()


def test_ray_is_the_pinned_one(manifest: Json) -> None:
    pin = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == pin[1]


def test_head_and_workers_have_one_environment_and_it_is_ray_s(
    overlay: str, manifest: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("service.cluster.environment.SCRIPTS", Path("/opt/farsight/bin"))
    head, workers = groups(manifest)
    assert container(head)["env"] == container(workers)["env"]
    assert container(head)["envFrom"] == container(workers)["envFrom"]
    # KubeRay copies `env` alone to its init container
    assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container(head)["env"]
    service = ray_environment(Config())
    ours = {name: value for name, value in environment(overlay, head).items() if name.startswith("RAY_")}
    assert {"RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY", DRAINING} <= ours.keys() <= service.keys()
    image = next(iter((ROOT / "Dockerfile").read_text().split("FROM base AS final")[1:]))
    assert ours.keys() - {DRAINING} == set(re.findall(r"\b(RAY_\w+)=", image))
    assert {name for name in ours if ours[name] != service[name]} == {DRAINING}


def test_kubernetes_sets_no_variables_of_its_own(overlay: str, manifest: Json) -> None:
    """The Service farsight-grpc would become FARSIGHT_GRPC_PORT=tcp://..., which is a setting of the service."""
    clashing = {f"FARSIGHT_{name.upper()}" for name in Config.model_fields} & {
        f"{service['metadata']['name'].upper().replace('-', '_')}_PORT" for service in of_kind(overlay, "Service")
    }
    assert clashing == {"FARSIGHT_GRPC_PORT"}
    assert all(pod(group)["enableServiceLinks"] is False for group in groups(manifest))


def test_the_image_is_that_of_the_device(overlay: str, manifest: Json, config: Config) -> None:
    head, workers = groups(manifest)
    device = "cuda" if overlay in GPUS else "cpu"
    assert container(head)["image"] == container(workers)["image"] == f"farsight:{device}"
    assert config.device == device
    makefile = (ROOT / "Makefile").read_text()
    assert f"--tag farsight:{device}" in makefile or device == "cuda"


def test_the_image_has_what_the_overlays_use() -> None:
    """psycopg for the ledger, NVML for joules, OTLP for traces."""
    [extras] = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text())
    assert {"gpu", "postgres", "tracing"} <= set(extras.split(","))


def test_the_head_does_no_work_and_a_worker_is_one_device(overlay: str, manifest: Json, config: Config) -> None:
    head, workers = groups(manifest)
    assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["rayStartParams"]["num-cpus"] == "1"
    resources = container(workers)["resources"]
    assert str(config.cpu_threads) == resources["limits"]["cpu"] == resources["requests"]["cpu"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    gpus = {name: amount for name, amount in resources["limits"].items() if name.startswith("nvidia.com/")}
    assert gpus == ({GPUS[overlay]: "1"} if overlay in GPUS else {})
    assert workers["rayStartParams"].get("num-gpus") == ("1" if overlay in GPUS else None)
    tolerated = {toleration["key"] for toleration in pod(workers).get("tolerations", ())}
    assert tolerated == ({"nvidia.com/gpu"} if overlay in GPUS else set())


def test_there_is_a_worker_for_every_replica(overlay: str, manifest: Json, config: Config) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    _, workers = groups(manifest)
    autoscales = cluster.get("enableInTreeAutoscaling", False)
    assert autoscales == (config.max_replicas is not None) == (overlay == "prod")
    if autoscales:
        assert (workers["minReplicas"], workers["maxReplicas"]) == (0, config.max_replicas)
    else:
        assert workers["minReplicas"] <= config.replicas == workers["replicas"] <= workers["maxReplicas"]


def test_the_autoscaler_may_ask_kubernetes_and_nobody_else(overlay: str, manifest: Json) -> None:
    head, workers = groups(manifest)
    assert pod(head)["automountServiceAccountToken"] is (overlay == "prod")
    assert pod(workers)["automountServiceAccountToken"] is False


def test_production_spreads_over_two_zones(manifest: Json, overlay: str) -> None:
    _, workers = groups(manifest)
    spread = {constraint["topologyKey"]: constraint for constraint in pod(workers)["topologySpreadConstraints"]}
    assert "kubernetes.io/hostname" in spread
    zones = spread.get("topology.kubernetes.io/zone")
    assert (zones is not None) == (overlay == "prod")
    if zones is not None:
        # a hard constraint would keep what a zone lost from starting in the other
        assert (zones["whenUnsatisfiable"], zones["maxSkew"]) == ("ScheduleAnyway", 1)
    assert all(constraint["matchLabelKeys"] == ["ray.io/cluster"] for constraint in spread.values())


def test_ports_are_those_of_the_service(manifest: Json, config: Config) -> None:
    _, workers = groups(manifest)
    ports = {port["name"]: port["containerPort"] for port in container(workers)["ports"]}
    assert ports["serve"] == config.http_port
    assert ports["serve-grpc"] == config.grpc_port
    assert ports["farsight"] == config.metrics_port
    assert ports["haproxy"] == config.haproxy_metrics_port
    assert config.metrics_host == "0.0.0.0"


def test_pods_meet_the_restricted_standard(overlay: str, manifest: Json) -> None:
    expected = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for group in groups(manifest):
        assert pod(group)["securityContext"]["runAsNonRoot"] is True
        assert pod(group)["securityContext"]["runAsUser"] == 1000
        assert pod(group)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(group)["securityContext"] == expected
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod(group).keys()
        assert {kind for volume in pod(group)["volumes"] for kind in volume} <= {"name", "emptyDir", "secret"}
    if overlay == "prod":  # the sidecar is KubeRay's, but for this
        assert manifest["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"] == expected


def test_what_is_written_to_can_be_written(manifest: Json) -> None:
    """The root is read-only: Ray's session and HAProxy's sockets are under /tmp, state and caches in the home."""
    [home] = re.findall(r"^WORKDIR (/home/.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for group in groups(manifest):
        writable = {mount["mountPath"] for mount in container(group)["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/dev/shm", "/tmp", home}
        assert str(Config.model_fields["cache_dir"].default).startswith("~/")
        assert str(Config.model_fields["state_dir"].default).startswith("~/")
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        disk = [gib(volumes[name]["emptyDir"]["sizeLimit"]) for name in ("tmp", "home")]
        assert sum(disk) <= gib(container(group)["resources"]["limits"]["ephemeral-storage"])


def test_shared_memory_is_memory_and_holds_the_object_store(manifest: Json) -> None:
    for group in groups(manifest):
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container(group)["volumeMounts"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        share = gib(volumes["shm"]["emptyDir"]["sizeLimit"]) / gib(container(group)["resources"]["limits"]["memory"])
        assert 0.3 <= share < 0.5  # Ray takes 30 % of the memory


def test_probes_need_only_what_the_image_has(manifest: Json, config: Config) -> None:
    head, workers = groups(manifest)
    for group in (head, workers):
        for probe in ("livenessProbe", "readinessProbe"):
            shell, flag, command = container(group)[probe]["exec"]["command"]
            assert (shell, flag) == ("bash", "-c")
            assert {part.split()[0] for part in re.split(r"&&|\|", command)} == {"wget", "grep"}
    assert f"localhost:{config.http_port}/-/healthz" in container(workers)["readinessProbe"]["exec"]["command"][2]
    assert container(workers)["readinessProbe"]["failureThreshold"] == 1


def test_a_pod_outlives_its_replica_s_shutdown_and_the_draining(overlay: str, manifest: Json, config: Config) -> None:
    application = build(config)
    shutdown_s = application._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    _, workers = groups(manifest)
    hard_stop_s = 120  # Ray's RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
    needed_s = shutdown_s + float(environment(overlay, workers)[DRAINING]) + hard_stop_s
    assert pod(workers)["terminationGracePeriodSeconds"] > needed_s


def test_keys_are_a_mounted_secret_and_the_ledger_is_a_database(overlay: str, manifest: Json, config: Config) -> None:
    """Everywhere but in `dev`, which is open."""
    assert (config.tenants_file is not None) == (overlay != "dev")
    for group in groups(manifest):
        secret = {v["name"]: v["secret"]["secretName"] for v in pod(group)["volumes"] if "secret" in v}
        mounted = [mount for mount in container(group)["volumeMounts"] if mount["name"] in secret]
        references = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container(group)["env"] if "valueFrom" in e}
        if config.tenants_file is None:
            assert (secret, mounted, references) == ({}, [], {})
            continue
        assert secret == {"tenants": "farsight-tenants"}
        # the whole folder: a file mounted by subPath never changes
        assert mounted == [{"name": "tenants", "mountPath": str(config.tenants_file.parent), "readOnly": True}]
        assert references == {"FARSIGHT_LEDGER_URL": {"name": "farsight-ledger", "key": "url"}}
    assert "LEDGER" not in manifest["spec"]["serveConfigV2"].upper().replace("KEYS, LEDGER", "")


def test_production_s_head_may_be_lost(manifest: Json, overlay: str) -> None:
    options = manifest["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")
    assert (options is not None) == (overlay == "prod")
    if options is not None:
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "farsight-redis"
        assert "value" not in options["redisPassword"]
