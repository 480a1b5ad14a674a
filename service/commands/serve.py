"""`farsight serve`: the service on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Annotated
from urllib.request import ProxyHandler, Request, build_opener

import typer

from service.billing.tenants import Tenants
from service.cluster import haproxy, launcher
from service.cluster.environment import (
    HOSTS,
    MAX_HAPROXY_DIR_LENGTH,
    connect_host,
    guard_record,
    is_port_taken,
    ports,
    ray_environment,
    ray_token,
)
from service.cluster.guard import Guard, lock
from service.cluster.leftovers import Alive
from service.commands.terminal import console, device, fail, settings
from service.config import Config, ModelConfig
from service.models.demo import DEMO_MODEL
from service.models.files import directory_of, read_json, takes_text, task_of
from service.scheduling.scheduler import Order


def serve(
    demo: Annotated[
        bool, typer.Option(help="Serve all-MiniLM-L6-v2 from its Python package, in addition to FARSIGHT_MODELS.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="Number of replicas, each on its own device.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
) -> None:
    """Run the service on this machine until Ctrl-C. Settings: FARSIGHT_* environment variables."""
    start(with_models(settings(replicas=replicas, http_port=port), demo=demo))


def start(config: Config, order: Order = "fair") -> None:
    """Check what can be checked before Ray starts, then run the service until Ctrl-C.

    `order` "arrival" is first in, first out without preemption; only a benchmark asks for it.
    """
    try:
        guard = Guard(guard_record(config))
        _check_addresses(config)
        lock(Path(f"{config.haproxy_dir}.lock"))  # another start with the same port may be using the directory
    except (Alive, OSError) as error:
        fail(str(error))
    if config.device == "cuda":  # Ray would wait for a GPU forever
        device(config)
    environment = ray_environment(config)
    environment[haproxy.SETTING] = _haproxy_command(environment[haproxy.SETTING])
    try:
        Tenants(config)
    except (OSError, ValueError) as error:
        fail(f"tenants: {error}")
    shutil.rmtree(config.metrics_dir, ignore_errors=True)  # counters of an earlier run; replicas make it
    shutil.rmtree(config.haproxy_dir, ignore_errors=True)
    config.haproxy_dir.mkdir(parents=True, mode=0o700)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    os.environ |= environment
    os.environ |= guard.environment
    os.environ |= {
        **ray_token(config),
        # makes Ray's own ports listen on loopback, as Ray does on Windows and macOS
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "FARSIGHT_METRICS_HOST": config.metrics_host,
    }
    try:
        launcher.run(config, guard, order, report=console.print, on_ready=lambda took_s: _print_ready(config, took_s))
    except launcher.StartFailed as error:
        fail(str(error))
    except launcher.RayDied as error:
        console.print(f"farsight: {error}", style="red", soft_wrap=True, markup=False)
        console.file.flush()
        os._exit(1)  # Ray's exit handlers would wait for what has died


def with_models(config: Config, *, demo: bool) -> Config:
    """`config`, with the demo model if asked for. Ends the command if files of a required model are missing."""
    if demo and DEMO_MODEL.name not in {model.name for model in config.models}:
        config = config.model_copy(update={"models": (*config.models, DEMO_MODEL)})
    for model in config.models:
        try:
            directory_of(model)
        except (OSError, ValueError) as error:
            if model.required:
                fail(str(error))
            console.print(f"farsight: not served: {error}", style="yellow", soft_wrap=True, markup=False)
    return config


def _embedder(model: ModelConfig) -> str | None:
    """The name of a model for embeddings of texts; None for others, and for one that cannot be read."""
    try:
        directory = directory_of(model)
        is_of_text = takes_text(read_json(directory / "config.json"))
        return model.name if is_of_text and (model.task or task_of(directory)) == "embed" else None
    except (OSError, ValueError):  # reported when it was loaded
        return None


def _check_addresses(config: Config) -> None:
    """Ends the command if a host, a port or a socket path cannot be used."""
    if config.host not in HOSTS:
        fail(
            f"FARSIGHT_HOST: expected {' or '.join(HOSTS)}, got {config.host}; "
            "Serve and HAProxy reach each other on loopback"
        )
    try:
        socket.create_server((config.metrics_host, 0)).close()
    except OSError as error:
        fail(f"FARSIGHT_METRICS_HOST: cannot listen on {config.metrics_host}: {error}")
    taken = [f"{port} (FARSIGHT_{field.upper()})" for field, host, port in ports(config) if is_port_taken(host, port)]
    if taken:
        fail(f"port already in use: {', '.join(taken)} (another service, or a leftover HAProxy)")
    if len(str(config.haproxy_dir)) > MAX_HAPROXY_DIR_LENGTH:
        fail(
            f"{config.haproxy_dir}: too long for the path of HAProxy's socket, expected at most "
            f"{MAX_HAPROXY_DIR_LENGTH} characters; set TMPDIR to a shorter path"
        )


def _haproxy_command(name: str) -> str:
    """The absolute path of the command: Ray does not search PATH. Ends the command if there is none."""
    path = shutil.which(name)
    if path is None:
        fail(f"{haproxy.SETTING}: expected an executable (farsight-haproxy or your HAProxy), got {name}")
    return str(Path(path).absolute())


def _print_ready(config: Config, took_s: float) -> None:
    console.print(_banner(config, took_s), soft_wrap=True)
    try:
        for name, reason in _failed_models(config).items():
            console.print(f"model {name!r} is not served: {reason}", style="red", soft_wrap=True)
    except OSError as error:  # not a reason to stop a running service
        console.print(f"the state of the models could not be read: {error}", style="red", soft_wrap=True)


def _banner(config: Config, took_s: float) -> str:
    host, metrics_host = connect_host(config.host), connect_host(config.metrics_host)
    base = f"http://{host}:{config.http_port}"
    key = " -H 'authorization: Bearer KEY'" if config.tenants or config.tenants_file else ""
    lines = [
        f"Farsight is ready after {took_s:.1f} s",
        f"  HTTP     {base}  (docs: {base}/docs)",
        f"  gRPC     {host}:{config.grpc_port}",
        f"  metrics  http://{metrics_host}:{config.metrics_port}/metrics",
        "try:",
        f"  curl -s {base}/v1/attention{key} -H 'content-type: application/json' \\",
        '    -d \'{"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]}\'',
    ]
    if (name := next(filter(None, map(_embedder, config.models)), None)) is not None:
        lines += [
            f"  curl -s {base}/v1/embeddings{key} -H 'content-type: application/json' \\",
            f'    -d \'{{"model": "{name}", "input": "How much does this cost?"}}\'',
        ]
    return "\n".join([*lines, "Press Ctrl-C to stop."])


def _failed_models(config: Config) -> dict[str, str]:
    """Name and reason of each model that a replica could not load; empty with tenants, because no key is known here.

    Raises OSError if the service does not answer.
    """
    if config.tenants or config.tenants_file:
        return {}
    url = f"http://{connect_host(config.host)}:{config.http_port}/v2/repository/index"
    # without the proxy of the environment, which cannot reach this machine's loopback
    with build_opener(ProxyHandler({})).open(Request(url, method="POST"), timeout=10) as answer:
        models = json.load(answer)
    return {model["name"]: model["reason"] for model in models if model["state"] == "UNAVAILABLE"}
