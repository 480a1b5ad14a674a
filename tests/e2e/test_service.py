"""Through the real ports: HTTP answers, refusals, metrics of both replicas, sizes and lost clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load, save

from benchmarks.servers.process import session
from service.attention import reference
from service.attention.masks import MaskSpec
from service.attention.synthetic import InputShape, structured
from service.config import Config
from tests.e2e.conftest import Service, environment, listens

pytestmark = pytest.mark.e2e

SMALL = {"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]}
BINARY = {"content-type": "application/x-safetensors", "accept": "application/x-safetensors"}


def scrape(service: Service) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{service.metrics_port}/metrics").text
    samples = re.findall(r"^(farsight_\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def total(samples: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value for key, value in samples.items() if key.startswith(name) and all(label in key for label in labels)
    )


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_long_attention_as_safetensors(http: httpx.Client, mode: str) -> None:
    query, key, value = structured(InputShape(1, 4, 2, 2048, 64), dtype=torch.float32, seed=3)
    options = json.dumps({"is_causal": True, "mode": mode})
    body = save({"query": query, "key": key, "value": value}, metadata={"options": options})
    response = http.post("/v1/attention", content=body, headers=BINARY)
    assert response.status_code == 200, response.text
    assert response.headers["x-attention-plan"] == mode
    output = load(response.content)["output"]
    exact = reference.attend(query, key, value, MaskSpec(is_causal=True)).out
    error = ((output - exact).norm() / exact.norm()).item()
    assert error <= (0.02 if mode == "sparse" else 1e-5)
    assert (response.headers["x-attention-error"] == "exact") == (mode != "sparse")
    if mode == "sparse":
        assert error <= float(response.headers["x-attention-error"])


def test_a_token_is_explained_in_words(http: httpx.Client) -> None:
    text = "The animal didn't cross the street because it was tired."
    answer = http.post("/v1/explain", json={"model": "all-MiniLM-L6-v2", "text": text, "query": "it"})
    told = answer.json()["explanation"]
    assert told["query"] == {"index": 10, "text": "it", "offsets": [43, 45]}
    assert {"animal", "tired"} <= {one["text"] for one in told["average"]}
    assert answer.headers["x-compute-tokens"] == "15"


def test_nobody_changes_models_unless_that_was_allowed(http: httpx.Client) -> None:
    answer = http.post("/v2/repository/models/all-MiniLM-L6-v2/unload")
    assert answer.status_code == 422
    assert "FARSIGHT_MODEL_CONTROL" in answer.json()["error"]
    assert [row["state"] for row in http.post("/v2/repository/index").json()] == ["READY"]


def test_the_request_id_is_said_once(http: httpx.Client) -> None:
    response = http.post("/v1/attention", json=SMALL, headers={"x-request-id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert response.json()["id"] == "mine"
    generated = http.post("/v1/attention", json=SMALL)
    assert generated.headers.get_list("x-request-id") == [generated.json()["id"]]
    assert len(http.get("/nothing").headers.get_list("x-request-id")) == 1


def test_counters_of_both_replicas_are_in_one_scrape(service: Service) -> None:
    before = scrape(service)

    def post(_: int) -> float:
        body = json.dumps({"model": "all-MiniLM-L6-v2", "input": "count me " * 20})
        answer = httpx.post(f"{service.url}/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        return float(answer.headers["x-device-seconds"])

    with ThreadPoolExecutor(8) as pool:
        device_s = list(pool.map(post, range(64)))
    after = scrape(service)

    def grown(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert grown("farsight_requests_total", 'endpoint="embeddings"', 'code="200"') == 64
    spent = grown("farsight_device_seconds_total", 'model="all-MiniLM-L6-v2"')
    assert spent == pytest.approx(sum(device_s), rel=1e-3)
    files = list(Path(service.log.parent, f"metrics-{service.metrics_port}").glob("counter_*.db"))
    assert len(files) == 2, "each replica keeps a file of its own"
    same = httpx.get(f"{service.url}/metrics").text
    assert "farsight_requests_total" in same


def test_all_metric_families_are_there(service: Service, http: httpx.Client) -> None:
    query, key, value = structured(InputShape(1, 2, 2, 1024, 32), seed=0)
    for options in ({"mode": "sparse"}, {"mode": "sparse", "max_error": 1e-9}):
        body = save({"query": query, "key": key, "value": value}, metadata={"options": json.dumps(options)})
        assert http.post("/v1/attention", content=body, headers=BINARY).status_code == 200
    assert http.post("/v1/attention", json={**SMALL, "mode": "wrong"}).status_code == 422
    found = {name.split("{")[0] for name in scrape(service)}
    families = {
        "requests_total", "request_duration_seconds_count", "queue_duration_seconds_count", "device_seconds_total",
        "flops_total", "attention_pairs_total", "cost_usd_total", "saved_usd_total", "peak_memory_bytes",
        "batch_requests_count", "batch_tokens_count", "sparse_density_ratio_count", "sparse_error_ratio_count",
        "fallbacks_total", "plans_total", "rejections_total", "queue_predicted_seconds", "prediction_ratio_count",
    }  # fmt: skip
    assert {f"farsight_{family}" for family in families} <= found


def test_a_3_gb_upload_is_refused_at_its_first_bytes(service: Service) -> None:
    head = (
        "POST /v1/attention HTTP/1.1\r\nhost: test\r\ncontent-type: application/x-safetensors\r\n"
        f"content-length: {3 * 10**9}\r\n\r\n"
    )
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", service.http_port), timeout=20) as connection:
        connection.sendall(head.encode() + bytes(1 << 16))
        answer = b""
        while b"}}" not in answer and (part := connection.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"3000000000" in answer
    assert time.monotonic() - start < 5


def test_a_client_that_leaves_is_counted_and_its_work_stops(service: Service, http: httpx.Client) -> None:
    query, key, value = structured(InputShape(1, 8, 8, 8192, 64), seed=1)
    body = save({"query": query, "key": key, "value": value}, metadata={"options": '{"mode": "chunked"}'})
    before = total(scrape(service), "farsight_requests_total", 'code="499"')
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/attention", content=body, headers=BINARY, timeout=httpx.Timeout(30, read=0.7))
    deadline = time.monotonic() + 10
    while total(scrape(service), "farsight_requests_total", 'code="499"') == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    start = time.monotonic()
    assert http.post("/v1/attention", json=SMALL).status_code == 200
    assert time.monotonic() - start < 2


def test_the_timeout_is_ours_and_says_504(http: httpx.Client) -> None:
    query, key, value = structured(InputShape(1, 8, 8, 8192, 64), seed=1)
    body = save({"query": query, "key": key, "value": value}, metadata={"options": '{"mode": "chunked"}'})
    # long enough for 50 MB to arrive on a loaded machine, too short for what they ask for
    response = http.post("/v1/attention", content=body, headers={**BINARY, "x-request-timeout-seconds": "1.2"})
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "deadline"


def failing_start(directory: Path, port: int, **changes: str) -> str:
    """What a start that must fail prints; one line."""
    result = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env={**environment(directory, port), **changes},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    lines = (result.stdout + result.stderr).strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_wrong_settings_are_one_line_before_anything_starts(tmp_path: Path) -> None:
    models = '[{"name": "mine", "path": "/no/such/model"}]'
    assert "'mine': /no/such/model/config.json is missing" in failing_start(tmp_path, 27500, FARSIGHT_MODELS=models)
    assert "FARSIGHT_HOST: expected 127.0.0.1 or 0.0.0.0, got 192.0.2.2" in failing_start(
        tmp_path, 27500, FARSIGHT_HOST="192.0.2.2"
    )
    told = failing_start(tmp_path, 27500, FARSIGHT_METRICS_HOST="192.0.2.200")
    assert "FARSIGHT_METRICS_HOST: cannot listen on 192.0.2.200" in told
    assert "FARSIGHT_HTPP_PORT" in failing_start(tmp_path, 27500, FARSIGHT_HTPP_PORT="1")
    assert "http_port" in failing_start(tmp_path, 27500, FARSIGHT_HTTP_PORT="99999")
    assert "/no/tenants.json" in failing_start(tmp_path, 27500, FARSIGHT_TENANTS_FILE="/no/tenants.json")
    assert "got /no/haproxy" in failing_start(tmp_path, 27500, RAY_SERVE_HAPROXY_BINARY_PATH="/no/haproxy")


def test_haproxy_closes_connections_to_a_node_that_is_silent(service: Service) -> None:
    (written,) = Config(http_port=service.http_port).haproxy_dir.glob("*/haproxy.cfg")
    text = written.read_text()
    servers = [line for line in text.splitlines() if line.strip().startswith("server ")]
    assert len(servers) >= 4  # two replicas, HTTP and gRPC
    assert all(line.count("tcp-ut 10s") == 1 for line in servers)
    assert text.count("option srvtcpka") == 1


def test_nothing_listens_beyond_this_machine(service: Service) -> None:
    """Neither Ray's ports, where who connects may run code, nor those of replicas, HAProxy's statistics and metrics."""
    found = {
        (one.name(), address.laddr.ip, address.laddr.port)
        for one in session(service.process.pid)
        for address in one.net_connections("inet")
        if address.status == psutil.CONN_LISTEN
    }
    assert {service.http_port, service.grpc_port, service.metrics_port} <= {port for _, _, port in found}
    assert not {each for each in found if each[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")}


def test_a_replica_that_cannot_start_says_why(tmp_path: Path) -> None:
    ledger = {"FARSIGHT_LEDGER_URL": "postgresql+psycopg://user:secretpw@127.0.0.1:1/ledger"}
    result = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env={**environment(tmp_path, 27500), **ledger},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    told = result.stdout + result.stderr
    (last,) = re.findall(r"^farsight: .*$", told, re.MULTILINE)
    assert "Connection refused" in last
    assert "Traceback" not in told
    assert "secretpw" not in told


@pytest.mark.parametrize("after_s", [0.5, 8.0], ids=["while it imports", "while Ray starts"])
def test_ctrl_c_while_it_starts_ends_it(after_s: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"],
        env=environment(tmp_path, 27500),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert b"starting" in process.stdout.readline()
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    assert b"Traceback" not in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert not any(listens(port) for port in range(27500, 27510))
    assert not [one.pid for one in psutil.process_iter(["environ"]) if str(tmp_path) in str(one.info["environ"])]


def test_a_taken_port_is_named(service: Service, tmp_path: Path) -> None:
    assert f"{service.http_port} (FARSIGHT_HTTP_PORT)" in failing_start(tmp_path, service.http_port)
