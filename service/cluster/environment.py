"""Ports that the service listens on, and the environment variables that Ray and HAProxy read."""

from __future__ import annotations

import os
import secrets
import socket
import sysconfig
from pathlib import Path

from service.cluster import haproxy
from service.config import Config

SCRIPTS = Path(sysconfig.get_path("scripts"))  # where pip puts commands; with --user they are elsewhere, see PATH
HOSTS = ("127.0.0.1", "0.0.0.0")  # noqa: S104
MAX_HAPROXY_DIR_LENGTH = 29  # the path of a Unix socket has at most 97 characters, and Ray adds 68


def ports(config: Config) -> list[tuple[str, str, int]]:
    """(field of Config, host, port) of every listener whose port is known before the start."""
    return [
        ("http_port", config.host, config.http_port),
        ("grpc_port", config.host, config.grpc_port),
        ("metrics_port", config.metrics_host, config.metrics_port),
        *(("replica_port_base", config.host, config.replica_port_base + offset) for offset in (0, 1)),
        *(("replica_port_base", "127.0.0.1", config.replica_port_base + offset) for offset in (100, 101)),
        ("haproxy_metrics_port", config.metrics_host, config.haproxy_metrics_port),
        ("haproxy_stats_port", "127.0.0.1", config.haproxy_stats_port),
    ]


def ray_environment(config: Config) -> dict[str, str]:
    """Environment variables that Ray reads at import; the image and the manifests set the same names."""
    directory = config.haproxy_dir
    return {
        "RAY_AUTH_MODE": "disabled",  # Ray may otherwise enable it by itself; `farsight serve` does, see ray_token
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(config.haproxy_metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(config.haproxy_stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        # measured with tensors of 1-32 MiB over gRPC: 2-3x faster at 1 MiB than the defaults of 64 and 16 KiB
        "RAY_SERVE_HAPROXY_H2_FE_INITIAL_WINDOW_SIZE": str(16 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_H2_BE_INITIAL_WINDOW_SIZE": str(16 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_H2_MAX_FRAME_SIZE": str(64 * 1024),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 1024),
        # further requests wait in the client, where the service can neither see nor refuse them
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "256",
        # If a replica dies before it answers, another one answers: running a request twice changes nothing, and the
        # lost run is not charged. HAProxy can only repeat what fits its buffer. Only once: the request may be what
        # killed the replica.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        haproxy.SETTING: os.environ.get(haproxy.SETTING) or str(SCRIPTS / "farsight-haproxy"),
        # Ray declares a silent node dead and starts replicas elsewhere after at most 24 s; by default after 65 s
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "3",
        # of HAProxy and its manager; three failures in a row replace them, by default after 30 s
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(config.replica_port_base),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(config.replica_port_base + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(config.replica_port_base + 99),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(config.replica_port_base + 100),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(config.replica_port_base + 101),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(config.replica_port_base + 199),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.max_request_bytes + 1024 * 1024),
        # a replica that is being removed answers until HAProxy has its next configuration: one reload here, on a
        # machine that may be busy starting replicas
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def guard_record(config: Config) -> Path:
    """The file that says which process serves with this state."""
    return config.state_dir / f"running-{config.metrics_port}"


def ray_token(config: Config) -> dict[str, str]:
    """Environment variables with which Ray's ports need a token; writes a new one, which only this user can read.

    Everything that listens on loopback is open to all users of the machine, and who connects to Ray may run code.
    """
    path = config.haproxy_dir / "ray-token"
    path.touch(0o600, exist_ok=False)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def connect_host(host: str) -> str:
    """The address at which this machine connects to what listens on `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def is_port_taken(host: str, port: int) -> bool:
    """Whether something accepts connections. Binding would also fail for a minute after connections were closed."""
    try:
        socket.create_connection((connect_host(host), port), timeout=1).close()
    except OSError:
        return False
    return True
