"""One frozen configuration, refused at start where it contradicts itself."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.config import Config, ModelConfig


def test_environment_sets_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSIGHT_GRPC_PORT", "9123")
    monkeypatch.setenv("FARSIGHT_MODELS", '[{"name": "m", "path": "/models/m"}]')
    config = Config(http_port=8123)
    assert (config.http_port, config.grpc_port) == (8123, 9123)
    assert config.models == (ModelConfig(name="m", path="/models/m"),)


def test_nobody_writes_to_it() -> None:
    with pytest.raises(ValidationError):
        Config().http_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"http_port": 9000}, "ports must differ"),
        ({"max_json_bytes": 2**31}, "is over max_request_bytes"),
        ({"models": [{"name": "m", "path": "a"}, {"name": "m", "path": "b"}]}, "names must differ"),
        ({"models": [{"name": "attention", "path": "a"}]}, "is reserved"),
        ({"models": [{"name": "m"}]}, "exactly one of path and package"),
        ({"models": [{"name": "../m", "path": "a"}]}, "pattern"),
        ({"max_eror": 0.1}, "max_eror"),
        ({"otlp_endpoint": "collector:4317"}, "otlp_endpoint"),
        ({"trace_ratio": 1.5}, "trace_ratio"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(wrong)


def test_services_on_other_ports_share_no_folder() -> None:
    one, other = Config(), Config(http_port=8100, metrics_port=9465)
    assert one.metrics_dir != other.metrics_dir
    assert one.haproxy_dir != other.haproxy_dir
