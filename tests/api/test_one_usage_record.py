"""What a request used is reported in five places, over two transports: everywhere the same numbers and names."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from prometheus_client import CollectorRegistry

from service.billing.ledger import LocalLedger
from service.engine.engine import Engine
from service.telemetry.logging import JsonFormatter
from service.telemetry.metrics import Metrics
from tests.api import test_grpc as grpc
from tests.engine.test_engine import total
from tests.engines import another
from tests.telemetry.followed import SMALL, Grpc, post

BAD = {**SMALL, "mode": "fast"}
DEMO = "all-MiniLM-L6-v2"
TEXT = {"model": DEMO, "input": "what does reading cost?"}


@pytest.fixture
def own() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def billed(engine: Engine, own: CollectorRegistry, tmp_path: Path) -> Iterator[Engine]:
    """One with a ledger, request lines and a registry of its own."""
    changes = {"state_dir": tmp_path, "request_log": True}
    config = engine.config.model_copy(update=changes)
    other = another(engine, config, metrics=Metrics(own), ledger=LocalLedger(config.ledger))
    yield other
    other.close()


def row_of(engine: Engine) -> dict[str, Any]:
    """The ledger's account of all requests so far."""
    (row,) = asyncio.run(engine.usage(0.0, time.time() + 1, ("endpoint", "plan", "outcome"), None))["groups"]
    found: dict[str, Any] = row
    return found


def line_of(caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    lines = [orjson.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == "farsight"]
    (line,) = [line for line in lines if line.get("request_id") == request_id]
    found: dict[str, Any] = line
    return found


def test_http_tells_the_same_usage_everywhere(billed: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="farsight"):
        response = post(billed, "/v1/attention", x_request_id="one")
    body, headers, line, row = response.json(), response.headers, line_of(caplog, "one"), row_of(billed)
    usage = body["usage"]
    assert int(headers["x-compute-tokens"]) == usage["tokens"] == line["tokens"] == row["tokens"] == 1
    assert int(headers["x-compute-flops"]) == usage["flops"] == line["flops"] == row["flops"] > 0
    assert usage["flops_dense"] == line["flops_dense"] == row["flops_dense"]
    device_s = usage["device_s"]
    assert device_s == body["timing"]["device_s"] > 0
    assert row["device_s"] == pytest.approx(device_s)
    for reported in (float(headers["x-device-seconds"]), line["device_s"]):
        assert reported == pytest.approx(device_s, abs=1e-6)
    assert body["cost"]["usd"] == line["cost_usd"]
    assert row["cost_usd"] == row["charged_usd"] == pytest.approx(body["cost"]["usd"])
    assert float(headers["x-cost-usd"]) == pytest.approx(body["cost"]["usd"], rel=1e-3)
    plans = {headers["x-attention-plan"], body["plan"]["kind"], line["plan"], row["plan"]}
    assert plans == {"dense"}


def test_reading_a_text_is_in_the_same_price_everywhere(billed: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="farsight"):
        response = post(billed, "/v1/embeddings", TEXT, x_request_id="read")
    body, line, row = response.json(), line_of(caplog, "read"), row_of(billed)
    host_s, device_s = body["usage"]["host_s"], body["usage"]["device_s"]
    assert host_s > 0
    for reported in (float(response.headers["x-host-seconds"]), line["host_s"]):
        assert reported == pytest.approx(host_s, abs=1e-6)
    assert row["host_s"] == pytest.approx(host_s)
    config = billed.config
    usd = (host_s * config.price_per_host_hour_usd + device_s * config.price_per_device_hour_usd) / 3600
    assert body["cost"]["usd"] == line["cost_usd"] == pytest.approx(usd)
    assert row["cost_usd"] == row["charged_usd"] == pytest.approx(usd)
    assert row["host_usd"] == pytest.approx(host_s * config.price_per_host_hour_usd / 3600)


@pytest.mark.parametrize(
    ("headers", "changes", "outcome"),
    [({"x_dry_run": "true"}, {}, "priced"), ({}, {"input": "a long text " * 2000, "truncate": "error"}, "too_large")],
)
def test_what_was_only_read_is_paid_for_and_recorded(
    billed: Engine, own: CollectorRegistry, headers: dict[str, str], changes: dict[str, Any], outcome: str
) -> None:
    response = post(billed, "/v1/embeddings", {**TEXT, **changes}, **headers)
    assert response.status_code == (200 if outcome == "priced" else 413)
    row = row_of(billed)
    assert (row["endpoint"], row["plan"], row["outcome"], row["requests"]) == ("embeddings", "none", outcome, 1)
    assert row["host_s"] > 0 == row["device_s"]
    assert row["charged_usd"] == row["cost_usd"] == row["host_usd"] > 0
    cost = total(own, "cost_usd_total", tenant="default", model=DEMO, plan="none")
    assert cost == pytest.approx(row["cost_usd"])
    if outcome == "priced":
        assert response.json()["host_s"] == pytest.approx(row["host_s"])


def test_grpc_tells_the_same_usage_everywhere(billed: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="farsight"):
        context = grpc.Context(x_request_id="two")
        message = asyncio.run(Grpc(billed).ModelInfer(grpc.attention(), context))
    reported = {name: value.string_param for name, value in message.parameters.items()}
    line, row = line_of(caplog, "two"), row_of(billed)
    assert int(reported["x-compute-tokens"]) == line["tokens"] == row["tokens"]
    assert int(reported["x-compute-flops"]) == line["flops"] == row["flops"] > 0
    assert float(reported["x-device-seconds"]) == pytest.approx(line["device_s"], abs=1e-6)
    assert float(reported["x-device-seconds"]) == pytest.approx(row["device_s"], abs=1e-6)
    assert float(reported["x-cost-usd"]) == pytest.approx(row["cost_usd"], rel=1e-3)
    assert {reported["x-attention-plan"], line["plan"], row["plan"]} == {"dense"}


@pytest.mark.parametrize(
    ("transport", "endpoint"), [("http", "attention"), ("open_inference", "infer"), ("grpc", "infer")]
)
def test_answers_and_refusals_name_the_same_endpoint(
    billed: Engine, own: CollectorRegistry, caplog: pytest.LogCaptureFixture, transport: str, endpoint: str
) -> None:
    with caplog.at_level(logging.INFO, logger="farsight"):
        for request_id, options in (("good", {}), ("bad", {"mode": "fast"})):
            if transport == "grpc":
                context = grpc.Context(x_request_id=request_id)
                asyncio.run(Grpc(billed).ModelInfer(grpc.attention(**options), context))
            elif transport == "http":
                post(billed, "/v1/attention", {**SMALL, **options}, x_request_id=request_id)
            else:
                path = "/v2/models/attention/infer"
                post(billed, path, open_inference(options), x_request_id=request_id)
    lines = [line_of(caplog, request_id) for request_id in ("good", "bad")]
    assert [(line["code"], line["endpoint"]) for line in lines] == [(200, endpoint), (422, endpoint)]
    assert row_of(billed)["endpoint"] == endpoint
    for code in ("200", "422"):
        assert counted(own, endpoint, code) == 1


def counted(registry: CollectorRegistry, endpoint: str, code: str) -> float:
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "farsight_requests_total"
        and (sample.labels["endpoint"], sample.labels["code"]) == (endpoint, code)
    )


def open_inference(options: dict[str, Any]) -> dict[str, Any]:
    def tensor(name: str) -> dict[str, Any]:
        values = torch.tensor(SMALL[name])
        data = values.flatten().tolist()
        return {"name": name, "datatype": "FP32", "shape": list(values.shape), "data": data}

    return {"inputs": [tensor(name) for name in ("query", "key", "value")], "parameters": options}
