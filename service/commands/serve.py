"""`farsight serve`: the service on this machine."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Annotated

import typer

from service.billing.tenants import Tenants
from service.cluster import haproxy
from service.cluster.environment import HOSTS, MAX_HAPROXY_DIR, _is_taken, ports, ray_environment
from service.cluster.launcher import _run
from service.commands.terminal import (
    device,
    fail,
    settings,
)
from service.config import Config
from service.models.demo import DEMO_MODEL
from service.models.files import directory_of


def serve(
    demo: Annotated[
        bool, typer.Option(help="Serve all-MiniLM-L6-v2 from its Python package, beside FARSIGHT_MODELS.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="Replicas, each on a device of its own.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
) -> None:
    """Run the service on this machine until Ctrl-C. Settings: FARSIGHT_* in the environment."""
    config = with_models(settings(replicas=replicas, http_port=port), demo=demo)
    if config.host not in HOSTS:
        fail(f"FARSIGHT_HOST is {' or '.join(HOSTS)}: Serve and HAProxy ask each other on the loopback interface")
    try:
        socket.create_server((config.metrics_host, 0)).close()
    except OSError as error:
        fail(f"FARSIGHT_METRICS_HOST={config.metrics_host} cannot be listened on: {error}")
    taken = [f"{number} (FARSIGHT_{field.upper()})" for field, host, number in ports(config) if _is_taken(host, number)]
    if taken:
        fail(f"port taken: {', '.join(taken)}; by another service, or the HAProxy of one that was killed")
    if len(str(config.haproxy_dir)) > MAX_HAPROXY_DIR:
        fail(f"{config.haproxy_dir} is too long for HAProxy's socket ({MAX_HAPROXY_DIR} characters); set TMPDIR")
    if config.device == "cuda":  # Ray would wait for a GPU for ever
        device(config)
    environment = ray_environment(config)
    binary = shutil.which(environment[haproxy.SETTING])
    if binary is None:
        fail(f"{environment[haproxy.SETTING]} cannot be run; {haproxy.SETTING} names farsight-haproxy or your HAProxy")
    environment[haproxy.SETTING] = str(Path(binary).absolute())  # Ray does not look into PATH
    try:
        Tenants(config)
    except (OSError, ValueError) as error:
        fail(f"tenants: {error}")
    shutil.rmtree(config.metrics_dir, ignore_errors=True)  # counters of an earlier run
    shutil.rmtree(config.haproxy_dir, ignore_errors=True)
    config.metrics_dir.mkdir(parents=True)
    config.haproxy_dir.mkdir(parents=True)
    os.environ.update(environment)
    # Ray's own ports, which ask for no key, listen on the loopback interface, as on the systems of the first one's name
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "FARSIGHT_METRICS_HOST": config.metrics_host}
    _run(config)


def with_models(config: Config, *, demo: bool) -> Config:
    """Ends the command where a model's files are not there."""
    if demo and DEMO_MODEL.name not in {model.name for model in config.models}:
        config = config.model_copy(update={"models": (*config.models, DEMO_MODEL)})
    for model in config.models:
        try:
            directory_of(model)
        except FileNotFoundError as error:
            fail(str(error))
    return config
