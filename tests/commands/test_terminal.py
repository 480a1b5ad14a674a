"""A wrong setting ends a command with one line that names the setting and the error."""

from __future__ import annotations

import pytest
import torch

from service.commands import terminal
from service.config import Config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FARSIGHT_HTTPPORT", "1", "FARSIGHT_HTTPPORT is not a setting"),
        ("FARSIGHT_HTTP_PORT", "99999", "http_port Input should be less than or equal to 65535"),
        ("FARSIGHT_MODELS", '[{"name"', "line 1 column 9"),
    ],
)
def test_wrong_settings(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal, "console", terminal.Console(width=80))
    with pytest.raises(SystemExit) as ended:
        terminal.settings()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("farsight: configuration: ")
    assert message in line


def test_given_settings_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSIGHT_HTTP_PORT", "8100")
    assert terminal.settings(http_port=None, replicas=3) == Config(http_port=8100, replicas=3)


def test_a_missing_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(terminal, "console", terminal.Console(width=80))
    with pytest.raises(SystemExit):
        terminal.device(Config(device="cuda"))
    assert capsys.readouterr().out == "farsight: device 'cuda' was asked for, but torch sees no CUDA device\n"
    assert terminal.device(Config(device="auto")) == torch.device("cpu")
