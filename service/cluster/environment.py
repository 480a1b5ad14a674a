"""Ports, and the environment that Ray and HAProxy read."""

from __future__ import annotations

import os
import socket
import sysconfig
from pathlib import Path

from service.cluster import haproxy
from service.config import Config

SCRIPTS = Path(sysconfig.get_path("scripts"))  # where pip puts commands; with --user, elsewhere: see PATH


HOSTS = ("127.0.0.1", "0.0.0.0")  # noqa: S104


MAX_HAPROXY_DIR = 29  # a socket's path may have 97 characters, and Ray adds 68


def ports(config: Config) -> list[tuple[str, str, int]]:
    """(field of Config, host, port) of everything that will listen on a port that is known before."""
    return [
        ("http_port", config.host, config.http_port),
        ("grpc_port", config.host, config.grpc_port),
        ("metrics_port", config.metrics_host, config.metrics_port),
        *(("replica_port_base", config.host, config.replica_port_base + more) for more in (0, 1)),
        *(("replica_port_base", "127.0.0.1", config.replica_port_base + more) for more in (100, 101)),
        ("haproxy_metrics_port", config.metrics_host, config.haproxy_metrics_port),
        ("haproxy_stats_port", "127.0.0.1", config.haproxy_stats_port),
    ]


def ray_environment(config: Config) -> dict[str, str]:
    """What Ray reads when it is imported; the same names are in the image and the manifests."""
    directory = config.haproxy_dir
    return {
        "RAY_AUTH_MODE": "disabled",  # one machine, loopback; it may otherwise switch itself on
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
        # more wait in the client, where nobody sees or refuses them
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "256",
        # a replica that dies with a request unanswered: another one answers it, for to do it twice changes nothing
        # (what was lost is not charged); HAProxy can repeat what fits its buffer. Once: a request may be what kills
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        haproxy.SETTING: os.environ.get(haproxy.SETTING) or str(SCRIPTS / "farsight-haproxy"),
        # Ray sees that a node is silent, and starts replicas elsewhere, after 24 s at most; by default after 65 s
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(config.replica_port_base),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(config.replica_port_base + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(config.replica_port_base + 99),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(config.replica_port_base + 100),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(config.replica_port_base + 101),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(config.replica_port_base + 199),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.max_request_bytes + 1024 * 1024),
        # a replica that leaves answers until HAProxy has its next configuration; here that is one reload, though of a
        # machine that is busy with starting replicas
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def reached_at(host: str) -> str:
    """Where this machine reaches what listens on `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def _is_taken(host: str, port: int) -> bool:
    """Somebody listens. Asked by connecting: a bind also fails for a minute on what closed connections leave behind."""
    try:
        socket.create_connection((reached_at(host), port), timeout=1).close()
    except OSError:
        return False
    return True
