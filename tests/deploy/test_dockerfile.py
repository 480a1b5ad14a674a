"""The Dockerfile, parsed; `make image-test` builds it. What it sets must agree with what the service sets."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.cluster.environment import ray_environment
from service.config import Config

ROOT = Path(__file__).parents[2]
ONE_MACHINE = re.compile(
    r"RAY_SERVE_(DIRECT_INGRESS_M.*|FALLBACK_PROXY_.*_PORT|HAPROXY_(CONFIG_FILE_LOC|SOCKET_PATH|SERVER_STATE_.*))"
)


@dataclass
class Stage:
    base: str
    name: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for first, rest in self.lines if first == word]


def parse(text: str) -> list[Stage]:
    """Stages with their instructions; comments gone, continued lines joined."""
    bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", bare).splitlines():
        word, _, rest = line.strip().partition(" ")
        match word.upper():
            case "":
                continue
            case "FROM":
                base, _, name = re.split(r"\s+(as)\s+", rest, flags=re.IGNORECASE)
                stages.append(Stage(base, name))
            case upper:
                stages[-1].lines.append((upper, rest.strip()))
    return stages


def problems(text: str) -> list[str]:
    """Structure that the image must keep; an empty list is good."""
    stages = parse(text)
    final = stages[-1]
    roots = {stage.base for stage in stages} - {stage.name for stage in stages}
    found = []
    if len(stages) < 2:
        found.append("expected a build stage and a final one")
    if roots != {"python:3.11-slim-bookworm"}:
        found.append(f"expected one pinned base image, got {sorted(roots)}")
    if not any('case "${DEVICE}"' in run for stage in stages if stage.all("ARG") for run in stage.all("RUN")):
        found.append("no RUN chooses by DEVICE in a stage that declares it")
    users = final.all("USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append(f"the final user must be a number other than 0, got {users}")
    installed = " ".join(final.all("RUN"))
    found += [f"the final stage has no {name}" for name in ("bash", "wget") if not re.search(rf"\b{name}\b", installed)]
    found += [f"the final stage has {name}" for name in ("gcc", "build-essential", "pip install") if name in installed]
    if not any("--from=build" in copy for copy in final.all("COPY")):
        found.append("the final stage copies nothing from the build stage")
    if not any("/healthz" in check for check in final.all("HEALTHCHECK")):
        found.append("no HEALTHCHECK on /healthz")
    return found


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "Dockerfile").read_text()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ("THROUGHPUT_OPTIMIZED", "HAPROXY_BINARY_PATH"):
        monkeypatch.delenv(f"RAY_SERVE_{name}", raising=False)
    for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "MAX_REQUEST_BYTES"):
        monkeypatch.delenv(f"FARSIGHT_{name}", raising=False)
    return Config()


def environment(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in parse(text)[-1].all("ENV") for pair in shlex.split(line))


def lint(dockerfile: Path) -> list[str]:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", "--format", "tty", dockerfile], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_hadolint_finds_nothing(tmp_path: Path, text: str) -> None:
    assert lint(ROOT / "Dockerfile") == []
    (tmp_path / "Dockerfile").write_text(text.replace("# hadolint ignore=DL3008\n", ""))
    assert ["DL3008" in line for line in lint(tmp_path / "Dockerfile")] == [True]


def test_structure(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("USER 1000:1000", "USER root", "the final user"),
        ('${DEVICE}" in', 'cpu" in', "chooses by DEVICE"),
        ("FROM base AS final", "FROM python:latest AS final", "one pinned base"),
        ("recommends bash wget", "recommends bash gcc", "no wget"),
        ("recommends bash wget", "recommends bash wget gcc", "has gcc"),
        ("/healthz", "/", "HEALTHCHECK"),
    ],
)
def test_a_broken_structure_is_found(text: str, old: str, new: str, expected: str) -> None:
    assert old in text
    assert any(expected in problem for problem in problems(text.replace(old, new)))


def test_both_devices_and_only_they_are_built(text: str) -> None:
    run = next(run for run in parse(text)[1].all("RUN") if "${DEVICE}" in run)
    cpu, cuda, other = (branch.split(")", 1)[1] for branch in run.split(" in ", 1)[1].split(";;")[:3])
    assert '--index-url "${TORCH_INDEX_URL}"' in cpu
    assert "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu" in parse(text)[1].all("ARG")
    assert "--index-url" not in cuda
    assert "exit 1" in other
    assert all("--constraint constraints.txt" in line for line in (cpu, cuda))


def test_the_environment_is_the_service_s_own(text: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cluster.environment.SCRIPTS", Path("/opt/farsight/bin"))
    image, service = environment(text), ray_environment(config)
    shared = image.keys() & service.keys()
    assert {"RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= shared
    assert {name: image[name] for name in shared} == {name: service[name] for name in shared}
    assert {name for name in image if name.startswith("RAY_")} <= service.keys()
    # the rest keeps several services on one machine apart; a container has its own ports and files
    assert {name for name in service.keys() - image.keys() if not ONE_MACHINE.fullmatch(name)} == set()


def test_farsight_s_own_variables_are_fields_of_the_configuration(text: str) -> None:
    names = {name.removeprefix("FARSIGHT_").lower() for name in environment(text) if name.startswith("FARSIGHT_")}
    assert names == {"host", "metrics_host"}
    assert names <= Config.model_fields.keys()


def test_it_runs_what_make_serve_runs_and_exposes_its_ports(text: str, config: Config) -> None:
    final = parse(text)[-1]
    recipe = re.search(r"^serve:.*\n\t@exec \$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert json.loads(final.all("CMD")[-1]) == recipe[1].split()
    ports = {str(config.http_port), str(config.grpc_port)}  # not the metrics', which need no key
    assert {port for line in final.all("EXPOSE") for port in line.split()} == ports
    assert set(re.findall(r"--publish (\d+):", text)) == ports
    assert f"FARSIGHT_HTTP_PORT:-{config.http_port}" in final.all("HEALTHCHECK")[0]


def test_what_is_copied_exists_and_is_let_into_the_build(text: str) -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*", "an allow list: what is new stays out until it is named"
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copies = [copy.split() for stage in parse(text) for copy in stage.all("COPY") if "--from" not in copy]
    sources = {source for *several, _ in copies for source in several}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
