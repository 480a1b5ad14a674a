"""A service that is started in a directory with modules of the same names as its own."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import start, stop

pytestmark = pytest.mark.e2e


def test_modules_of_the_working_directory_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "service"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('not the service')")
    monkeypatch.chdir(tmp_path)
    service = start(tmp_path, 28600, "--replicas", "1", FARSIGHT_STATE_DIR="state")
    body = {"query": [[[1.0]]], "key": [[[1.0]]], "value": [[[2.0]]]}
    assert httpx.post(f"{service.url}/v1/attention", json=body, timeout=60).json()["output"] == [[[2.0]]]
    assert (tmp_path / "state" / f"ledger-{service.metrics_port}.sqlite").exists(), "relative to the directory"
    assert stop(service) == 0
    assert "not the service" not in service.log.read_text()
