"""What an object of deploy/kustomize may contain, by its kind: unknown fields are errors, as the API server would drop
or refuse them.

Kubernetes' own kinds are checked by kubernetes-validate; a RayService by KubeRay's definition, and its pods as pods;
kinds of the Gateway API and of the Prometheus Operator by what is written down of them here, which is what we use.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT.parent / "shared/kuberay/ray.io_rayservices.yaml"
VERSION = "1.33"  # of Kubernetes

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


STRING: Json = {"type": "string", "minLength": 1}
PORT: Json = {"type": "integer", "minimum": 1, "maximum": 65535}
WORDS: Json = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Json = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def one_of(*values: str) -> Json:
    return {"enum": list(values)}


def some(item: Json) -> Json:
    return {"type": "array", "items": item, "minItems": 1}


def fields(required: str = "", /, **properties: Json) -> Json:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


METADATA = fields("name", name=STRING, namespace=STRING, labels=WORDS, annotations=WORDS)


def kind(spec: Json) -> Json:
    return fields("apiVersion kind metadata spec", apiVersion=STRING, kind=STRING, metadata=METADATA, spec=spec)


def route(rule: Json) -> Json:
    parent = fields("name", name=STRING, sectionName=STRING)
    return kind(fields("parentRefs hostnames rules", parentRefs=some(parent), hostnames=some(STRING), rules=some(rule)))


BACKENDS = some(fields("name port", name=STRING, port=PORT))
RELABELING = fields(
    "action targetLabel",
    action=one_of("replace"),
    targetLabel=STRING,
    replacement=STRING,
    sourceLabels=some(STRING),
)
RULE = fields(
    "expr",
    **{"record": STRING, "alert": STRING, "expr": STRING, "for": DURATION, "labels": WORDS, "annotations": WORDS},
)

OURS: dict[tuple[str, str], Json] = {
    ("gateway.networking.k8s.io/v1", "Gateway"): kind(
        fields(
            "gatewayClassName listeners",
            gatewayClassName=STRING,
            listeners=some(
                fields(
                    "name port protocol",
                    name=STRING,
                    hostname=STRING,
                    port=PORT,
                    protocol=one_of("HTTP", "HTTPS", "TLS", "TCP", "UDP"),
                    tls=fields(
                        "",
                        mode=one_of("Terminate", "Passthrough"),
                        certificateRefs=some(fields("name", kind=STRING, name=STRING)),
                    ),
                    allowedRoutes=fields("", namespaces=fields("", **{"from": one_of("All", "Same", "Selector")})),
                )
            ),
        )
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): route(
        fields(
            "backendRefs",
            matches=some(
                fields("", path=fields("", type=one_of("Exact", "PathPrefix", "RegularExpression"), value=STRING))
            ),
            timeouts=fields("", request=DURATION, backendRequest=DURATION),
            backendRefs=BACKENDS,
        )
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): route(fields("backendRefs", backendRefs=BACKENDS)),
    ("monitoring.coreos.com/v1", "PodMonitor"): kind(
        fields(
            "selector podMetricsEndpoints",
            selector=fields("matchLabels", matchLabels=WORDS),
            podMetricsEndpoints=some(
                fields("port", port=STRING, path=STRING, interval=DURATION, relabelings=some(RELABELING))
            ),
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): kind(
        fields("groups", groups=some(fields("name rules", name=STRING, interval=DURATION, rules=some(RULE))))
    ),
}


@functools.cache
def rayservice_schema() -> Json | None:
    """KubeRay's, version v1; None where there is no copy of its definition beside the checkout."""
    if not DEFINITION.exists():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1 MB: 15 s in pure Python
    definition = yaml.load(DEFINITION.read_text(), Loader=loader)
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    whole: Json = version["schema"]["openAPIV3Schema"]
    # the definition says only `object`
    name = {"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
    whole["properties"]["metadata"] = {**METADATA, "properties": {**METADATA["properties"], "name": name}}
    return whole


@functools.cache
def rayservice_validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict(rayservice_schema()))


def groups(rayservice: Json) -> tuple[Json, Json]:
    """Head and workers."""
    cluster = rayservice["spec"]["rayClusterConfig"]
    [workers] = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def pod_of(group: Json, namespace: str) -> Json:
    """The pod that KubeRay makes of a group."""
    metadata = {**group["template"].get("metadata", {}), "name": "pod", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", **group["template"], "metadata": metadata}


def core_errors(found: Json) -> list[str]:
    try:
        kubernetes_validate.validate(found, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def errors(found: Json) -> list[str]:
    """What is wrong with an object; SchemaNotFoundError where nothing is known of its kind."""
    if found["kind"] == "RayService":
        schema, wrong = rayservice_schema(), []
        if schema is not None:
            filled = with_defaults(schema, found)
            wrong = [f"{e.json_path}: {e.message}" for e in rayservice_validator().iter_errors(filled)]
        return wrong or [
            error for group in groups(found) for error in core_errors(pod_of(group, found["metadata"]["namespace"]))
        ]
    schema = OURS.get((found["apiVersion"], found["kind"]))
    if schema is None:
        return core_errors(found)
    return [f"{e.json_path}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(found)]
