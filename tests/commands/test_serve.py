"""What `farsight serve` refuses before Ray starts."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from service.commands import serve
from service.config import Config


def test_the_directory_of_a_service_that_is_starting_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another state directory, the same HTTP port, which nothing listens on yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serve, "Guard", lambda _: None)
    monkeypatch.setattr(serve, "MAX_HAPROXY_DIR_LENGTH", 1000)
    config = Config(state_dir=tmp_path / "state", http_port=28990)
    config.haproxy_dir.mkdir()
    other = os.open(tmp_path / "farsight-28990.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        serve.start(config)
    os.close(other)
    assert config.haproxy_dir.exists()
    assert "already running or starting: another process holds" in capsys.readouterr().out
