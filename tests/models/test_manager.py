"""Models from a repository: by name, and nothing outside of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import transformers as hf

from service.config import Config
from service.errors import FarsightError, Kind
from service.models.manager import ModelManager
from service.models.registry import Registry
from tests.models import zoo
from tests.models.common import SETTINGS


def test_links_out_of_the_repository_are_refused(tmp_path: Path) -> None:
    repository, outside = tmp_path / "repository", tmp_path / "outside"
    zoo.save("bert", hf.AutoModel, outside)
    shutil.copytree(outside, repository / "own")
    (repository / "folder").symlink_to(outside)
    shutil.copytree(outside, repository / "file")
    (repository / "file" / "config.json").unlink()
    (repository / "file" / "config.json").symlink_to(outside / "config.json")
    (repository / "alias").symlink_to(repository / "own")
    registry = Registry(SETTINGS)
    manager = ModelManager(Config(model_repository=repository, model_control=True), registry)
    try:
        for name, link in (("folder", "folder"), ("file", "file/config.json")):
            with pytest.raises(FarsightError, match=f"{link} is a link out of the model repository") as caught:
                asyncio.run(manager.load(name))
            assert caught.value.kind is Kind.INVALID
            assert str(outside) not in caught.value.message
        for name in ("own", "alias"):
            asyncio.run(manager.load(name))
        assert {info.name for info in registry.infos()} == {"own", "alias"}
    finally:
        manager.close()
