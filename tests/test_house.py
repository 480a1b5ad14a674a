"""Who may import whom, and how large things may grow. Each rule is also shown to fail on a planted breach."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "service"
MODULES = house.files(ROOT)
MAX_FILE, MAX_FILE_WITHOUT_REASON, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 400, 300, 300, 50, 7

FORBIDDEN = {
    "service.config": ("torch", "ray", "transformers", "fastapi"),
    "service.core.request": ("torch", "ray", "transformers", "fastapi"),
    "service.core.answer": ("torch", "ray", "transformers", "fastapi"),
    "service.core.run": ("torch", "ray", "pydantic"),
    "service.core.passes": ("torch", "ray", "pydantic"),
    "service.errors": ("torch", "ray", "pydantic"),
    "service.attention.dispatch": ("ray", "transformers", "fastapi", "grpc"),
    "service.attention.geometry": ("torch", "ray"),
    "service.models.registry": ("ray", "fastapi", "grpc"),
    "service.planning.planner": ("torch", "ray"),
    "service.planning.forward_plan": ("torch", "ray"),
    "service.planning.attention_cost": ("torch", "ray"),
    "service.planning.forward_cost": ("torch", "ray"),
    "service.planning.calibration": ("torch", "ray"),
    "service.scheduling.admission": ("torch", "ray"),
    "service.scheduling.scheduler": ("torch", "ray"),
    "service.scheduling.device_loop": ("torch", "ray"),
    "service.scheduling.device_thread": ("torch", "ray"),
    "service.scheduling.preemption": ("torch", "ray"),
    "service.engine.shares": ("torch", "ray"),
    "service.billing.metering": ("torch", "ray", "fastapi"),
    "service.billing.tenants": ("torch", "ray", "sqlalchemy"),
    "service.simulate.cluster": ("torch", "ray"),
    "service.engine.engine": ("ray", "fastapi", "grpc", "sqlalchemy"),
    "service.telemetry.metrics": ("torch", "ray", "fastapi"),
    "service.api.handler": ("ray", "fastapi", "grpc"),
    "service.api.http.app": ("ray",),
    "service.api.grpc.methods": ("ray", "fastapi"),
    "service.api.grpc.health": ("torch", "ray"),
    "service.cluster.haproxy": ("torch", "ray", "pydantic"),
    "service.commands.main": ("torch", "ray", "transformers"),
}


@pytest.mark.parametrize(("module", "forbidden"), FORBIDDEN.items())
def test_heavy_libraries_stay_out(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_imports_itself_through_others() -> None:
    assert house.circles(house.graph(ROOT)) == []


def test_imports_go_downward() -> None:
    assert house.upward(house.graph(ROOT)) == []


Plant = Callable[[str, str], None]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Writes files of a small house."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


@pytest.mark.parametrize(
    "text",
    [
        "from service.engine.b import x",
        "from service.engine import b",
        "import service.engine.b",
        "def f():\n    from service.engine.b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from service.engine.b import x",
    ],
)
def test_a_planted_circle_is_found(plant: Plant, tmp_path: Path, text: str) -> None:
    plant("service/engine/a.py", text)
    plant("service/engine/b.py", "from service.engine.c import y")
    plant("service/engine/c.py", "from service.engine.a import z")
    expected = [["service.engine.a", "service.engine.b", "service.engine.c"]]
    assert house.circles(house.graph(tmp_path)) == expected
    plant("service/engine/c.py", "")
    assert house.circles(house.graph(tmp_path)) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("service.scheduling.a", "service.engine.b"),
        ("service.models.a", "service.planning.b"),
        ("service.telemetry.a", "service.attention.b"),
        ("service.engine.a", "benchmarks.b"),
        ("service.commands.a", "loadtests.b"),
    ],
)
def test_a_planted_import_to_a_higher_or_a_sister_room_is_found(
    plant: Plant, tmp_path: Path, importer: str, imported: str
) -> None:
    text = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {imported} import x\n"
    plant(f"{importer.replace('.', '/')}.py", text)
    plant(f"{imported.replace('.', '/')}.py", "")
    assert house.upward(house.graph(tmp_path)) == [(importer, imported)]


def own_files() -> list[tuple[str, Path]]:
    return [(name, path) for name, path in MODULES.items() if name.split(".")[0] == "service"]


@pytest.mark.parametrize(("name", "path"), own_files(), ids=[name for name, _ in own_files()])
def test_files_classes_and_functions_stay_small(name: str, path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= MAX_FILE
    if lines > MAX_FILE_WITHOUT_REASON:
        assert "one file because" in (ast.get_docstring(ast.parse(text)) or "").lower(), "no reason for its length"
    for found in house.definitions(path, name):
        assert found.lines <= (MAX_FUNCTION if found.is_function else MAX_CLASS), f"{found.name}: {found.lines} lines"
        assert found.parameters <= MAX_PARAMETERS or found.is_command, f"{found.name}: {found.parameters} parameters"


def test_kinds_of_requests_are_told_apart_by_their_workloads_only() -> None:
    allowed = ("service.engine.workloads.", "service.api.open_inference.")  # and the protocol's parser
    for name, path in own_files():
        for node in ast.walk(ast.parse(path.read_text())):
            is_check = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            if is_check and any(kind in ast.unparse(node) for kind in ("AttentionRequest", "ForwardRequest")):
                assert name.startswith(allowed), f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_only_the_cluster_imports_ray(path: Path) -> None:
    importers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            importers |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            importers.add((node.module or "").split(".")[0])
    assert "ray" not in importers or path.parent == SERVICE / "cluster"
