"""The commands outside the product start, and what scripts and the Makefile run with `python -m` exists."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLERS = [ROOT / "Makefile", *sorted((ROOT / "scripts").iterdir())]
RUN = re.compile(r"""(?:python\S*|executable),? ["']?-m["']?,? ["']?([\w.]+)""")


@pytest.mark.parametrize(("module", "option"), [("loadtests", "--sweep"), ("benchmarks", "predictions")])
def test_help_is_printed(module: str, option: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert option in result.stdout


def test_modules_that_are_run_exist() -> None:
    ours = {"service", "benchmarks", "loadtests", "scripts"}
    named = {name for path in CALLERS if path.is_file() for name in RUN.findall(path.read_text())}
    assert {"loadtests", "scripts.checkov"} <= named
    assert all(find_spec(name) is not None for name in named if name.split(".")[0] in ours)
    assert not [name for name in named if name == "service"], (
        "load tests and benchmarks are not commands of the service"
    )
