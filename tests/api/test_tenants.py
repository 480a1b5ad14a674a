"""Keys, usage and dry runs over HTTP and gRPC: who may ask what, and what is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from service.api.grpc import methods
from service.api.handler import Handler
from service.api.http.app import create_app
from service.api.proto import open_inference_grpc_pb2 as pb
from service.billing.ledger import LocalLedger
from service.billing.tenants import key_hash
from service.config import Budget, TenantConfig
from service.engine.engine import Engine
from service.telemetry.metrics import Metrics
from tests.api.common import caller
from tests.api.test_grpc import SAMPLE, Context, attention
from tests.api.test_http import SMALL
from tests.engines import another

TENANTS = (
    TenantConfig(name="root", key_sha256=(key_hash("root-key"),), is_admin=True),
    TenantConfig(name="shop", key_sha256=(key_hash("shop-key"),)),
    TenantConfig(name="poor", key_sha256=(key_hash("poor-key"),), budgets=(Budget(usd=1e-12, per="day"),)),
)
ROOT, SHOP, POOR = ({"authorization": f"Bearer {name}-key"} for name in ("root", "shop", "poor"))


@pytest.fixture(scope="module")
def closed(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with tenants."""
    config = engine.config.model_copy(
        update={"tenants": TENANTS, "state_dir": tmp_path_factory.mktemp("state"), "model_control": True}
    )
    metrics, bank = Metrics(CollectorRegistry()), LocalLedger(config.ledger)
    other = another(engine, config, metrics=metrics, ledger=bank)
    yield other
    other.close()


@pytest.fixture(scope="module")
def call(closed: Engine) -> Any:
    return caller(create_app(closed))


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/attention"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/estimate"),
        ("GET", "/v1/models"),
        ("GET", "/v1/usage"),
        ("GET", "/v2"),
        ("GET", "/v2/models/attention"),
        ("POST", "/v2/models/attention/infer"),
        ("POST", "/v2/repository/index"),
        ("GET", "/metrics"),
    ],
)
def test_without_a_known_key_nothing_is_told(call: Any, method: str, path: str, headers: dict[str, str]) -> None:
    # the body would be refused, too: who calls is asked first
    response = call(method, path, headers=headers, **({"content": b"{"} if method == "POST" else {}))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "API key" in response.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs"])
def test_health_and_documentation_take_no_key(call: Any, path: str) -> None:
    assert call("GET", path).status_code == 200


def test_only_administrators_see_metrics_and_change_models(call: Any) -> None:
    for method, path in (("GET", "/metrics"), ("POST", "/v2/repository/models/none/load")):
        assert call(method, path, headers=SHOP).status_code == 403
        assert call(method, path, headers=ROOT).status_code != 403
    assert call("POST", "/v2/repository/index", headers=SHOP).status_code == 200


def test_usage_is_ones_own_or_an_administrators(call: Any) -> None:
    for headers in (SHOP, SHOP, ROOT):
        assert call("POST", "/v1/attention", json=SMALL, headers=headers).status_code == 200
    own = call("GET", "/v1/usage?group_by=tenant,plan,outcome", headers=SHOP).json()
    assert [(one["tenant"], one["plan"], one["requests"]) for one in own["data"]] == [("shop", "dense", 2)]
    assert own["data"][0]["device_s"] > 0
    assert "capacity" not in own
    everything = call("GET", "/v1/usage", headers=ROOT).json()
    assert {one["tenant"]: one["requests"] for one in everything["data"]} == {"root": 1, "shop": 2}
    assert everything["capacity"].keys() == {"used_s", "idle_s", "usd"}
    hours = call("GET", "/v1/usage?group_by=day&from=2026-01-01&to=2100-01-01T00:00:00Z", headers=SHOP).json()
    assert hours["from"] == "2026-01-01T00:00:00Z"
    assert hours["data"][0]["day"].endswith("T00:00:00Z")
    assert call("GET", "/v1/usage?from=0&to=1000", headers=ROOT).json()["data"] == []
    assert call("GET", "/v1/usage?to=1970-01-01", headers=ROOT).status_code == 422  # from and to are one


@pytest.mark.parametrize(
    "query",
    [
        "from=yesterday",
        "to=nan",
        "from=1e400",
        "from=0001-01-01T00:00:00%2B14:00",
        "to=9999-12-31T23:59:59-12:00",
        "to=0001-01-01",
        "from=2026-02-01&to=2026-01-01",
        "group_by=user",
        "tenant=a",
        "group_by=plan,plan",
    ],
)
def test_questions_that_cannot_be_answered_are_422(call: Any, query: str) -> None:
    response = call("GET", f"/v1/usage?{query}", headers=SHOP)
    assert response.status_code == 422, response.text


def test_a_budget_that_is_too_small_is_told(call: Any) -> None:
    response = call("POST", "/v1/attention", json=SMALL, headers=POOR)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "over_budget"
    assert "budget usd/day of tenant 'poor'" in response.json()["error"]["message"]
    priced = call("POST", "/v1/attention", json=SMALL, headers={**POOR, "x-dry-run": "true"}).json()
    assert priced["would_admit"] is False
    assert "budget usd/day of tenant 'poor'" in priced["chosen"]["reason"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/attention", SMALL),
        ("/v1/embeddings", {"model": "all-MiniLM-L6-v2", "input": "what would it cost?"}),
        (
            "/v2/models/all-MiniLM-L6-v2/infer",
            {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["what would it cost?"]}]},
        ),
    ],
)
def test_a_dry_run_is_priced_and_does_not_run(call: Any, closed: Engine, path: str, body: dict[str, Any]) -> None:
    before = closed.capacity().used_s
    response = call("POST", path, json=body, headers={**SHOP, "x-dry-run": "true"})
    assert response.status_code == 200
    assert response.json()["dense"]["predicted_s"] > 0
    assert response.json()["dense"]["cost_usd"] > 0
    assert response.json()["would_admit"] is True
    assert closed.capacity().used_s == before
    assert call("POST", path, json=body, headers={**SHOP, "x-dry-run": "perhaps"}).status_code == 400


class Service(methods.GrpcMethods):
    def __init__(self, engine: Engine) -> None:
        self.handler = Handler(engine)


def test_grpc_takes_the_same_keys(closed: Engine) -> None:
    service = Service(closed)

    def infer(**metadata: str) -> tuple[pb.ModelInferResponse, Context]:
        context = Context(**metadata)
        return asyncio.run(service.ModelInfer(attention(), context)), context

    for metadata in ({}, {"authorization": "Bearer wrong"}):
        _, context = infer(**metadata)
        assert context.code is grpc.StatusCode.UNAUTHENTICATED
    message, context = infer(authorization="Bearer shop-key")
    assert context.code is grpc.StatusCode.OK
    assert list(message.outputs[0].shape) == list(SAMPLE.shape)
    message, context = infer(authorization="Bearer shop-key", x_dry_run="true")
    assert context.code is grpc.StatusCode.OK
    assert not message.outputs
    assert json.loads(message.parameters["estimate"].string_param)["dense"]["predicted_s"] > 0
    _, context = infer(x_api_key="poor-key")
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    metadata_context = Context()
    asyncio.run(service.ModelMetadata(pb.ModelMetadataRequest(name="attention"), metadata_context))
    assert metadata_context.code is grpc.StatusCode.UNAUTHENTICATED
    for key, code in (("", grpc.StatusCode.UNAUTHENTICATED), ("shop-key", grpc.StatusCode.OK)):
        metadata_context = Context(x_api_key=key)
        asyncio.run(service.ServerMetadata(pb.ServerMetadataRequest(), metadata_context))
        assert metadata_context.code is code
    live = asyncio.run(service.ServerLive(pb.ServerLiveRequest(), Context()))
    assert live.live
