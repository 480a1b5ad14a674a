"""Who may import whom: downward only, and the heavy libraries only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = Path(__file__).parent.parent / "service"

# a layer may import itself and the layers before it
LAYERS = (
    ("config", "core", "errors", "device"),
    ("attention",),
    ("telemetry",),
    ("models",),
    ("planning",),
    ("billing",),
    ("scheduling",),
    ("engine",),
    ("simulate",),
    ("api",),
    ("cluster", "commands"),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

FORBIDDEN = {
    "service.config": ("torch", "ray", "transformers", "fastapi"),
    "service.core": ("torch", "ray", "transformers", "fastapi"),
    "service.errors": ("torch", "ray", "pydantic"),
    "service.attention": ("ray", "transformers", "fastapi", "grpc"),
    "service.models.registry": ("ray", "fastapi", "grpc"),
    "service.planning.planner": ("torch", "ray"),
    "service.planning.attention_cost": ("torch", "ray"),
    "service.scheduling.admission": ("torch", "ray"),
    "service.scheduling.scheduler": ("torch", "ray"),
    "service.engine.shares": ("torch", "ray"),
    "service.billing.metering": ("torch", "ray", "fastapi"),
    "service.billing.tenants": ("torch", "ray", "sqlalchemy"),
    "service.simulate.cluster": ("torch", "ray"),
    "service.engine.engine": ("ray", "fastapi", "grpc", "sqlalchemy"),
    "service.telemetry.metrics": ("torch", "ray", "fastapi"),
    "service.api.http.endpoint": ("ray",),
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


def layer_of(path: Path) -> str:
    return path.relative_to(SERVICE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Layers of `service` that a file imports, at the top or inside functions, type-only ones left out."""
    tree = ast.parse(path.read_text())
    type_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("service.")}
    return found


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_imports_go_downward(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == SERVICE:
        assert not imports(path)
        return
    layer = layer_of(path)
    upward = {name for name in imports(path) if RANK[name] > RANK[layer]}
    assert not upward, f"{path.relative_to(SERVICE)} imports {sorted(upward)}"


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_only_the_cluster_imports_ray(path: Path) -> None:
    importers = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert ("ray" in importers) == (
        path.name in ("deployment.py", "ledger_actor.py", "launcher.py") and path.parent == SERVICE / "cluster"
    )
