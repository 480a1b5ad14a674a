"""deploy/RUNBOOK.md names only alerts, metrics, settings and files that exist, and every alert."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from service.config import Config
from service.telemetry.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
TEXT = (DEPLOY / "RUNBOOK.md").read_text()
RULES = [
    rule for group in yaml.safe_load((DEPLOY / "monitoring/rules.yml").read_text())["groups"] for rule in group["rules"]
]


def test_every_alert_is_named_and_no_other() -> None:
    assert set(re.findall(r"`(Farsight\w+)`", TEXT)) == {rule["alert"] for rule in RULES if "alert" in rule}


def test_metrics_and_recorded_series_exist() -> None:
    registry = CollectorRegistry()
    Metrics(registry=registry)
    exported = {name for metric in registry.collect() for name in (metric.name, f"{metric.name}_total")}
    named = set(re.findall(r"`(farsight_\w+)`", TEXT))
    assert named
    assert named <= exported
    assert set(re.findall(r"`(farsight:[\w:]+)`", TEXT)) <= {rule["record"] for rule in RULES if "record" in rule}


def test_settings_exist() -> None:
    named = set(re.findall(r"\bFARSIGHT_(\w+)", TEXT))
    assert named
    assert named <= {name.upper() for name in Config.model_fields}


def test_files_exist() -> None:
    named = set(re.findall(r"\b((?:base|components|deploy|monitoring)/[\w./-]+\w|\w+\.example\.yaml)", TEXT))
    assert {"base/network.yaml", "components/gateway", "secrets.example.yaml"} <= named
    places = (DEPLOY, DEPLOY / "kustomize", DEPLOY.parent)
    assert {name for name in named if not any((at / name).exists() for at in places)} == set()
