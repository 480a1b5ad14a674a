"""deploy/kustomize as `kubectl kustomize` renders it: no cluster is asked."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "gpu", "mig", "prod")

Json = dict[str, Any]


def tool(name: str, script: str) -> str:
    """A program of the PATH or of .tools; skips where the machine has none, but never in CI."""
    tools = f"{ROOT / '.tools'}:{ROOT / '.tools/usr/bin'}"
    found = shutil.which(name) or shutil.which(name, path=tools)
    if found is None:
        reason = f"no {name}: neither on the PATH nor in .tools; {script} gets Debian's"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("kubectl", "scripts/kubectl.sh"), "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@functools.cache
def _text(overlay: str) -> str:
    result = kustomize(ROOT / "deploy/kustomize" / overlay)
    assert result.returncode == 0, result.stderr
    return result.stdout


def documents(text: str) -> list[Json]:
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def objects(overlay: str) -> list[Json]:
    """Those of overlays/<overlay>, or of `base`."""
    return documents(_text(overlay if overlay == "base" else f"overlays/{overlay}"))


def of_kind(overlay: str, kind: str) -> list[Json]:
    return [found for found in objects(overlay) if found["kind"] == kind]


def only(overlay: str, kind: str, name: str | None = None) -> Json:
    [found] = [found for found in of_kind(overlay, kind) if name in (None, found["metadata"]["name"])]
    return found
