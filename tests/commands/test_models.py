"""Models on the command line: those of packages, and those whose files are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf
from typer.testing import CliRunner

from service.commands.main import app
from service.commands.serve import _banner, with_models
from service.config import Config, ModelConfig
from service.models.packaged.catalogue import MODELS
from tests.models import zoo


def test_packaged_models_are_listed_with_their_licenses() -> None:
    listed = CliRunner().invoke(app, ["models"]).output
    for model in MODELS.values():
        assert model.name in listed
        assert model.license in listed
        assert model.requirement in listed


def test_an_unknown_name_and_a_model_that_is_there(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(app, ["models", "get", "nobody"])
    assert unknown.exit_code == 1
    assert "expected one of smollm2, rxnfp, rxnmapper, dinov2, whisper, got 'nobody'" in unknown.output
    (tmp_path / "config.json").write_text("{}")
    there = CliRunner().invoke(app, ["models", "get", "rxnfp", "--into", str(tmp_path)])
    assert there.exit_code == 0
    assert "is there already" in there.output
    assert f'[{{"name": "rxnfp", "path": "{tmp_path}"}}]' in there.output


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["models", "get", "rxnfp", "--into", str(tmp_path)])
    assert refused.exit_code == 1
    assert "exists" in refused.output
    assert "FARSIGHT_MODELS" not in refused.output


def test_only_a_required_model_stops_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("[]")
    optional = Config(models=(ModelConfig(name="broken", path=str(tmp_path), required=False),))
    assert with_models(optional, demo=False) == optional
    assert "not served" in capsys.readouterr().out
    assert "/v1/embeddings" not in _banner(optional, 1.0)
    with pytest.raises(SystemExit):
        with_models(Config(models=(ModelConfig(name="broken", path=str(tmp_path)),)), demo=False)


def test_the_command_to_try_is_for_a_model_of_texts(tmp_path: Path) -> None:
    zoo.save("vit", hf.AutoModel, tmp_path / "vision")
    zoo.save("whisper", hf.AutoModel, tmp_path / "speech")
    zoo.save("bert", hf.AutoModel, tmp_path / "words")
    names = ("vision", "speech", "words")
    models = tuple(ModelConfig(name=name, path=str(tmp_path / name)) for name in names)
    assert '{"model": "words", "input"' in _banner(Config(models=models), 1.0)
    assert "/v1/embeddings" not in _banner(Config(models=models[:2]), 1.0)
