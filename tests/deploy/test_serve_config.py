"""deploy/serve.yaml: valid for Ray, without unknown keys (Ray ignores those), and buildable by the real builder."""

from __future__ import annotations

import copy
import types
import typing
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from service.cluster.deployment import GRPC_SERVICERS, build
from service.config import Config
from service.models.demo import DEMO_MODEL

ROOT = Path(__file__).parents[2]


def models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The pydantic models that a field may hold, through Optional, Union, List and Dict."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, pydantic.BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def unknown_keys(model: type[pydantic.BaseModel], value: Any, path: str = "") -> list[str]:
    """Keys that are no field of the model there; where a field is a plain dict (args) Ray has no say."""
    if isinstance(value, list):
        return [key for index, item in enumerate(value) for key in unknown_keys(model, item, f"{path}[{index}]")]
    if not isinstance(value, dict):
        return []
    fields = {**model.model_fields, **{f.alias: f for f in model.model_fields.values() if f.alias}}
    found = []
    for key, inner in value.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in fields:
            found.append(here)
            continue
        candidates = [unknown_keys(inside, inner, here) for inside in models_in(fields[key].annotation)]
        found += min(candidates, key=len, default=[])
    return found


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())


@pytest.fixture(scope="module")
def args(document: dict[str, Any]) -> dict[str, Any]:
    [application] = document["applications"]
    return application["args"]


def test_ray_accepts_it_and_knows_every_key(document: dict[str, Any]) -> None:
    parsed = ServeDeploySchema.model_validate(document)
    assert [(app.name, app.route_prefix, app.import_path) for app in parsed.applications] == [
        ("farsight", "/", "service.cluster.deployment:build")
    ]
    assert parsed.proxy_location == "EveryNode"
    assert unknown_keys(ServeDeploySchema, document) == []


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        ((), "aplications"),
        (("http_options",), "prot"),
        (("grpc_options",), "grpc_servicer_function"),
        (("logging_config",), "log_levle"),
        (("applications", 0), "rout_prefix"),
    ],
)
def test_a_typo_that_ray_swallows_is_found(document: dict[str, Any], path: tuple[Any, ...], typo: str) -> None:
    wrong = copy.deepcopy(document)
    place = wrong
    for step in path:
        place = place[step]
    place[typo] = "x"
    assert [found.rpartition(".")[2] for found in unknown_keys(ServeDeploySchema, wrong)] == [typo]


def test_a_typo_in_a_deployment_override_is_found(document: dict[str, Any]) -> None:
    wrong = copy.deepcopy(document)
    wrong["applications"][0]["deployments"] = [{"name": "Farsight", "autoscaling_config": {"min_replica": 1}}]
    found = unknown_keys(ServeDeploySchema, wrong)
    assert found == ["applications[0].deployments[0].autoscaling_config.min_replica"]


def test_the_servicers_are_those_of_the_application(document: dict[str, Any]) -> None:
    assert document["grpc_options"]["grpc_servicer_functions"] == GRPC_SERVICERS


def test_the_arguments_are_a_configuration(document: dict[str, Any], args: dict[str, Any]) -> None:
    config = Config.model_validate(args)
    assert config.models == (DEMO_MODEL,)
    assert config.http_port == document["http_options"]["port"]
    assert config.grpc_port == document["grpc_options"]["port"]
    with pytest.raises(pydantic.ValidationError, match="replica\n"):
        Config.model_validate({**args, "replica": 2})


def test_ray_s_own_builder_builds_the_application(
    args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray hands `args` over as a Config only where it can read the builder's annotation as a class; what they leave out
    comes from the node's environment."""
    for name, value in (("DEVICE", "cpu"), ("REPLICAS", "2"), ("CPU_THREADS", "3")):
        monkeypatch.setenv(f"FARSIGHT_{name}", value)
    application = call_user_app_builder_with_args_if_necessary(build, {**args, "state_dir": str(tmp_path)})
    deployment = application._bound_deployment
    config, order = deployment.init_args
    assert order == "fair"
    assert deployment.name == "Farsight"
    assert config.cpu_threads == 3
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_gpus"] == 0
