"""API keys to tenants, known and unknown, and a tenants file that changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.billing.tenants import Tenants, key_hash, key_of
from service.config import Budget, Config, TenantConfig
from service.errors import FarsightError, Kind

GOLD = TenantConfig(name="gold", key_sha256=(key_hash("gold-key"), key_hash("other-key")), weight=3.0)


def refusal(tenants: Tenants, key: str | None) -> Kind:
    with pytest.raises(FarsightError) as caught:
        tenants.of(key)
    return caught.value.kind


def test_without_tenants_any_request_is_of_the_default_tenant() -> None:
    tenants = Tenants(Config())
    assert tenants.is_open
    for key in (None, "anything"):
        assert tenants.of(key).name == "default"
        assert tenants.of(key).is_admin


def test_only_a_key_identifies_its_tenant() -> None:
    tenants = Tenants(Config(tenants=(GOLD,)))
    assert tenants.of("gold-key") is tenants.of("other-key") is GOLD
    for key in (None, "", "gold", "gold-key ", key_hash("gold-key")):
        assert refusal(tenants, key) is Kind.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer  abc "}, "abc"),
        ({"x-api-key": "abc"}, "abc"),
        ({"authorization": "Basic abc", "x-api-key": "def"}, "def"),
        ({"authorization": "Basic abc"}, None),
        ({}, None),
    ],
)
def test_keys_are_read_from_either_header(headers: dict[str, str], key: str | None) -> None:
    assert key_of(headers) == key


def test_a_file_adds_tenants_and_changes_while_the_service_runs(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps([{"name": "silver", "key_sha256": [key_hash("s1")]}]))
    tenants = Tenants(Config(tenants=(GOLD,), tenants_file=file))
    assert tenants.of("s1").name == "silver"
    weights, budget = tenants.weights, {"usd": 1, "per": "day"}
    changed = {"name": "silver", "key_sha256": [key_hash("s2")], "budgets": [budget], "weight": 9}
    file.write_text(json.dumps([changed]))
    os.utime(file, (1, 1))
    tenants.refresh()
    assert refusal(tenants, "s1") is Kind.UNAUTHENTICATED
    assert weights == {"gold": 3.0, "silver": 9.0}  # the same object: the scheduler keeps it
    assert tenants.of("s2").budgets == (Budget(usd=1, per="day"),)
    assert tenants.of("gold-key") is GOLD


@pytest.mark.parametrize("text", ["", "[{}]", '[{"name": "gold"}]', "[", '[{"name": "x", "key_sha256": ["secret"]}]'])
def test_an_invalid_file_changes_nothing(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps([{"name": "silver", "key_sha256": [key_hash("s1")]}]))
    tenants = Tenants(Config(tenants=(GOLD,), tenants_file=file))
    file.write_text(text)
    os.utime(file, (1, 1))
    tenants.refresh()
    assert tenants.of("s1").name == "silver"
    assert "tenants_file was not loaded" in caplog.text
    assert "secret" not in caplog.text  # a key given instead of its hash must not be logged


def test_invalid_tenants_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must differ"):
        Config(tenants=(GOLD, GOLD))
    with pytest.raises(ValueError, match="share a key"):
        Tenants(Config(tenants=(GOLD, TenantConfig(name="thief", key_sha256=GOLD.key_sha256[:1]))))
    empty = tmp_path / "none.json"
    empty.write_text("[]")
    with pytest.raises(ValueError, match="expected at least one tenant, got none"):
        Tenants(Config(tenants_file=empty))
    with pytest.raises(ValueError, match="exactly one"):
        Budget(per="day")
    with pytest.raises(ValueError, match="differ in unit or period"):
        TenantConfig(name="a", budgets=(Budget(usd=1, per="day"), Budget(usd=2, per="day")))
    with pytest.raises(ValueError, match="pattern"):
        TenantConfig(name="a", key_sha256=("a key that is no hash",))


def test_only_configured_tenants_are_metric_labels() -> None:
    tenants = Tenants(Config(tenants=(GOLD,)))
    assert [tenants.label(name) for name in ("gold", "default", "silver")] == ["gold", "default", "unknown"]
