"""Planning runs without torch and ray, so that prices cost no start-up time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PLANNING = Path(__file__).parents[2] / "service" / "planning"


def test_planning_imports_neither_torch_nor_ray() -> None:
    modules = ", ".join(f"service.planning.{path.stem}" for path in PLANNING.glob("[a-z]*.py"))
    code = f"import {modules}, sys; print([name for name in ('torch', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
