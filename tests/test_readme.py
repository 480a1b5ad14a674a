"""The README's map is true: what its tree and its life of a request name exists, and so do its make targets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TREE = README.split("## The tree", 1)[1].split("```", 2)[1]
LIFE = README.split("## The life of a request", 1)[1].split("## The tree", 1)[0]
NAME = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|sh|txt)\b|(?:[\w.-]+/)+(?=[\s,`])|\bDockerfile\b|\bMakefile\b")


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.splitlines()


@pytest.mark.parametrize("name", sorted(set(NAME.findall(TREE) + NAME.findall(LIFE))))
def test_named_paths_exist(name: str) -> None:
    inside = f"/{name}"
    assert any(f"/{path}".endswith(inside) or (name.endswith("/") and inside in f"/{path}") for path in tracked()), name


def test_every_module_is_on_the_map() -> None:
    modules = {Path(path).name for path in tracked() if re.fullmatch(r"(?:service|benchmarks)/[\w/]+\.py", path)}
    helpers = {"__init__.py"}
    missing = {name for name in modules - helpers if name not in TREE and "_pb2" not in name}
    assert not missing


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake (serve|test|[a-z]*test|[a-z]+)(?=`|\s{2,}|$)", README, re.MULTILINE))
    assert {"serve", "test", "loadtest"} <= named <= targets


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$|TODO|FIXME|XXX", README, re.MULTILINE)
