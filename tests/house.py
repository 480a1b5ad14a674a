"""The house as its imports and definitions show it: who imports whom, and how large things are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("service", "benchmarks", "loadtests")

# a room may import itself and the rooms of the layers before it; rooms of one layer do not import one another
LAYERS = (
    ("core", "errors", "config"),
    ("device", "disk"),
    ("telemetry", "attention"),
    ("planning", "models", "billing"),
    ("scheduling",),
    ("engine",),
    ("simulate", "api"),
    ("cluster",),
    ("commands",),
    ("__main__",),
)
GROUND = LAYERS[0]  # these three may import one another, without a circle
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def files(root: Path) -> dict[str, Path]:
    """Module name -> file of everything that is not a test or a script; generated stubs are left out."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if "_pb2" in path.name:
                continue
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports: at the top, inside functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found |= {full} if full in modules else {node.module} & modules.keys()
    return found


def graph(root: Path) -> dict[str, set[str]]:
    modules = files(root)
    return {module: imports(path, modules) - {module} for module, path in modules.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module. Ref: Tarjan 1972."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return found


def room(module: str) -> str:
    """service.engine.workloads.base -> engine"""
    return module.split(".")[1]


def upward(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(importer, imported) that go to a higher layer, to another room of the same layer, or out of the product."""
    found = []
    for module, others in sorted(edges.items()):
        for other in sorted(others):
            inside = module.startswith("service."), other.startswith("service.")
            if not inside[0]:
                continue  # benchmarks and load tests stand above
            if not inside[1]:
                found.append((module, other))
                continue
            mine, theirs = room(module), room(other)
            is_sideways = RANK[theirs] == RANK[mine] and mine != theirs and mine not in GROUND
            if RANK[theirs] > RANK[mine] or is_sideways:
                found.append((module, other))
    return found


@dataclass(frozen=True, slots=True)
class Definition:
    """A function or class: where it is, how many lines, and of a function how many parameters."""

    place: str
    name: str
    is_function: bool
    lines: int
    parameters: int = 0
    is_command: bool = False  # of typer: its parameters are the command's options


def definitions(path: Path, place: str) -> Iterator[Definition]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            yield Definition(place, node.name, False, _lines(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            count += (arguments.vararg is not None) + (arguments.kwarg is not None)
            annotated = ast.unparse(arguments)
            yield Definition(place, node.name, True, _lines(node), count, "typer.Option" in annotated)


def _lines(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1
