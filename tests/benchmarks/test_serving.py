"""The benchmark of servers: its arithmetic, its command lines, and with tiny servers everything that can go wrong."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop
from typer.testing import CliRunner

from benchmarks import serving
from benchmarks.client import Exchange, exchanged
from benchmarks.command import app
from benchmarks.servers import process
from benchmarks.servers.lineup import (
    LINEUP,
    MODEL,
    TORCH,
    Contender,
    Place,
)
from benchmarks.servers.process import (
    Unavailable,
    install,
    running,
    session,
    versions,
)
from benchmarks.serving import (
    Round,
    Row,
    Settings,
    lowest_cosine,
    notes,
    percentile,
    ratios,
    requests_of,
    table_rows,
)
from service.config import Config

SMALL = Settings(rounds=2, requests=20, clients=4)
BY_NAME = {contender.name: contender for contender in LINEUP}
CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()

# answers [len(text), 1]; argv: port, file for its process id, answers until it misbehaves, how
SERVER = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, note, good, how = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
open(note, "w").write(str(os.getpid()))
subprocess.Popen(["sleep", "60"])  # left behind
answered = 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def do_POST(self):
        global answered
        answered += 1
        bad = answered > good
        if bad and how == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        body = json.dumps({"data": [{"embedding": [len(text), 1]}]}).encode()
        self.send_response(500 if bad else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(name: str, note: Path, good: int = 10**9, how: str = "fail") -> Contender:
    def command(place: Place) -> list[str]:
        return [place.python, "-S", "-c", SERVER, str(place.port), str(note), str(good), how]

    return Contender(name, command)


def script(name: str, code: str) -> Contender:
    return Contender(name, lambda place: [place.python, "-S", "-c", code])


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return replace(SMALL, first_port=probe.getsockname()[1])


def run(settings: Settings, directory: Path, *lineup: Contender) -> list[Row]:
    return serving.run(settings, directory, directory / "cache", lambda what: None, lineup)


def place_of(port: int = 21300, scratch: Path = Path("/scratch")) -> Place:
    return Place("/venv/bin/python", Path("/model"), port, scratch)


def assert_ended(note: Path) -> None:
    """The server and the child that it left behind."""
    assert not session(int(note.read_text()))


def test_percentiles_are_values_that_were_measured() -> None:
    hundred = [float(value) for value in range(100, 0, -1)]
    assert [percentile(hundred, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1, 2, 3]
    assert percentile([7.0], 0.5) == 7


def test_a_round_is_what_the_client_measured() -> None:
    exchange = Exchange(4.0, [value / 100 for value in range(1, 201)], [])
    assert serving.round_of(exchange) == Round(50.0, 1.0, 1.9, 1.98)
    rounds = [Round(1, 5, 6, 7), Round(9, 4, 8, 7), Round(3, 3, 7, 1)]
    assert serving.medians(rounds) == Round(3, 4, 7, 7)


def test_ratios_are_to_the_best_other_figure_by_figure() -> None:
    rows = [
        Row("farsight", medians=Round(30, 0.5, 2.0, 3.0)),
        Row("a", medians=Round(20, 1.0, 1.0, 6.0)),
        Row("b", medians=Round(10, 0.25, 4.0, 6.0)),
        Row("c", "did not start"),
    ]
    assert ratios(rows) == {"requests_per_s": 1.5, "p50_s": 2.0, "p95_s": 2.0, "p99_s": 0.5}
    assert ratios(rows[:1]) == ratios(rows[1:]) == {}
    assert table_rows(rows)[-1] == ("farsight / best other", "1.50x", "2.00x", "2.00x", "0.50x", "")
    assert len(table_rows(rows[1:])) == 3


def test_table_rows_show_figures_or_that_there_are_none() -> None:
    rows = [
        Row("a", "", Round(12.34, 0.0123, 1.5, 2.0), 0.99999949, (), {"torch": "2.13.0", "x": "1"}),
        Row("b", "no such file"),
    ]
    assert table_rows(rows) == [
        ("a", "12.3", "12 ms", "1,500 ms", "2,000 ms", "0.999999"),
        ("b", "absent", "", "", "", ""),
    ]
    assert notes(rows) == ["a: torch 2.13.0, x 1", "b: no such file"]


def test_cosines_ignore_the_length_and_find_the_worst() -> None:
    import numpy as np

    ours = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert lowest_cosine(ours, ours * 3) == pytest.approx(1)
    assert lowest_cosine(ours, np.array([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5**0.5)
    assert lowest_cosine(ours, np.ones((2, 3))) == 0


def test_command_lines_serve_the_local_model_on_the_cpu() -> None:
    place = place_of()
    for contender in LINEUP[1:]:
        command = contender.command(place)
        assert "/model" in command
        assert "21300" in command
        assert "32" in command
        assert contender.environment(place)["HF_HUB_OFFLINE"] == "1"
    infinity = BY_NAME["infinity-emb"].command(place)
    assert infinity[:2] == ["/venv/bin/infinity_emb", "v2"]
    assert infinity[infinity.index("--dtype") + 1] == "float32"
    assert infinity[infinity.index("--device") + 1] == "cpu"
    for name in ("litserve", "fastapi"):
        python, path = BY_NAME[name].command(place)[:2]
        assert python == "/venv/bin/python"
        source = Path(path).read_text()
        assert "service" not in re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE)


def test_farsight_gets_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BY_NAME["farsight"].command(place_of())[1:] == ["-m", "service", "serve", "--demo"]
    monkeypatch.setenv("FARSIGHT_MODELS", '[{"name": "mine", "path": "/mine"}]')
    for name, value in BY_NAME["farsight"].environment(place_of(21300)).items():
        monkeypatch.setenv(name, value)
    config = Config()
    assert (config.models, config.device, config.replicas, config.state_dir) == ((), "cpu", 1, Path("/scratch"))
    listening = {value for name, value in config if name.endswith("_port")}
    assert listening == set(range(21300, 21305))
    assert config.replica_port_base == 21400


def test_bodies_differ_only_in_what_a_server_needs() -> None:
    bodies = {
        contender.name: orjson.loads(requests_of(contender, 1, ["a text"])[0].partition(b"\r\n\r\n")[2])
        for contender in LINEUP
    }
    assert bodies.pop("farsight") == {"model": MODEL, "input": "a text", "truncate": "end"}
    assert list(bodies.values()) == [{"model": MODEL, "input": "a text"}] * 3


def test_every_venv_gets_the_torch_that_farsight_runs_with() -> None:
    assert TORCH in CONSTRAINTS
    for contender in LINEUP[1:]:
        assert contender.requirements[0] == TORCH
        assert all("==" in requirement for requirement in contender.requirements)
    for name in ("litserve", "fastapi"):  # not handicapped by older libraries
        assert set(BY_NAME[name].requirements[:3]) <= set(CONSTRAINTS)


def test_a_venv_is_kept_while_its_requirements_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = BY_NAME["fastapi"]
    folder = tmp_path / "fastapi"
    folder.mkdir()
    (folder / "requirements.txt").write_text("\n".join(contender.requirements) + "\n")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert install(contender, tmp_path) == str(folder / "bin" / "python")
    with pytest.raises(Unavailable, match="not installed: no output"):
        install(replace(contender, requirements=(*contender.requirements, "more==1")), tmp_path)
    with pytest.raises(Unavailable, match="not installed"):
        install(contender, tmp_path)  # the one before left nothing that counts as installed


def test_versions_are_those_of_what_was_installed() -> None:
    assert list(versions(BY_NAME["farsight"], sys.executable)) == ["farsight", "ray", "transformers", "torch"]
    assert TORCH.partition("==")[2] in versions(BY_NAME["fastapi"], sys.executable)["torch"]
    assert "infinity-emb" not in versions(BY_NAME["infinity-emb"], sys.executable)  # not in ours


def test_a_failing_server_is_reported_with_its_reason_and_the_others_run(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    rows = run(
        settings,
        tmp_path,
        server("farsight", tmp_path / "farsight.pid"),
        script("crashes", "raise SystemExit('no such thing')"),
        Contender("missing", lambda place: ["/nowhere/server"]),
        Contender("uninstallable", lambda place: [], requirements=("nothing==0",)),
        server("overloaded", tmp_path / "overloaded.pid", good=30),
        server("other", tmp_path / "other.pid"),
    )
    reasons = {row.name: row.absent for row in rows}
    assert reasons["farsight"] == reasons["other"] == ""
    assert reasons["crashes"] == "ended with 1: no such thing"
    assert reasons["missing"].startswith("not started: ")
    assert reasons["uninstallable"].startswith("not installed: ")
    assert reasons["overloaded"].startswith("failed under load: RuntimeError: status 500")
    ours, *_, other = rows
    assert len(ours.rounds) == len(other.rounds) == 2
    for row in (ours, other):
        assert row.lowest_cosine == pytest.approx(1)
        for measured in row.rounds:
            assert measured.requests_per_s > 0
            assert 0 < measured.p50_s <= measured.p95_s <= measured.p99_s
        assert_ended(tmp_path / f"{row.name}.pid")
    assert_ended(tmp_path / "overloaded.pid")
    assert set(ratios(rows)) == {"requests_per_s", "p50_s", "p95_s", "p99_s"}


def test_a_server_that_does_not_get_ready_is_stopped(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START_TIMEOUT_S", 0.5)
    never = replace(server("says nothing", tmp_path / "pid"), ready="ready")
    deaf = script("deaf", "import time; time.sleep(60)")
    first, second = run(replace(settings, rounds=1), tmp_path, never, deaf)
    assert first.absent == "not ready in 0 s: it did not print 'ready'"
    assert "not ready in 0 s: " in second.absent
    assert_ended(tmp_path / "pid")


def test_a_port_in_use_is_not_measured(tmp_path: Path, settings: Settings) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", settings.first_port))
        listener.listen()
        (row,) = run(settings, tmp_path, server("farsight", tmp_path / "pid"))
    assert row.absent == f"port {settings.first_port} is already in use"
    assert not (tmp_path / "pid").exists()


def test_ctrl_c_ends_what_was_started(tmp_path: Path, settings: Settings) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, server("farsight", tmp_path / "pid", good=20, how="interrupt"))
    assert_ended(tmp_path / "pid")
    assert signal.getsignal(signal.SIGTERM) is before


def test_answers_are_in_the_order_of_the_requests(tmp_path: Path, settings: Settings) -> None:
    contender = server("farsight", tmp_path / "pid")
    place = Place(sys.executable, tmp_path, settings.first_port, tmp_path / "scratch")
    requests = requests_of(contender, place.port, ["a" * length for length in range(1, 31)])
    with running(contender, place, requests[0]):
        exchange = uvloop.run(exchanged("127.0.0.1", place.port, requests, 8))
    assert serving.vectors_of(exchange.bodies)[:, 0].tolist() == list(range(1, 31))
    assert len(exchange.latencies_s) == 30
    assert 0 < max(exchange.latencies_s) <= exchange.took_s


def test_answers_of_another_format_are_refused() -> None:
    with pytest.raises(Unavailable, match="unexpected format"):
        serving.vectors_of([b'{"vectors": []}'])


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = (Round(30.0, 0.5, 1.0, 1.5),)
    rows = [
        Row("farsight", "", measured[0], 1.0, measured, {"torch": "2.13.0"}),
        Row("litserve", "", Round(15.0, 1.0, 1.0, 1.0), 0.5, measured, {}),
        Row("fastapi", "not installed: no space left"),
    ]
    given: list[Any] = []

    def measure(settings: Settings, *others: Any) -> list[Row]:
        given.append(settings)
        return rows

    monkeypatch.setattr(serving, "run", measure)
    output = tmp_path / "figures.json"
    arguments = ["serving", "--rounds", "1", "--requests", "64", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert given == [Settings(rounds=1, requests=64)]
    for part in ("requests/s", "farsight / best other", "2.00x", "0.500000", "not installed: no space left"):
        assert part in result.output
    figures = orjson.loads(output.read_bytes())["figures"]
    assert figures["against_best_other"]["requests_per_s"] == 2
    assert [row["absent"] for row in figures["rows"]] == ["", "", "not installed: no space left"]
    assert figures["rows"][0]["rounds"][0]["p95_s"] == 1
