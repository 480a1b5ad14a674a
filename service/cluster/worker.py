"""Runs first in every process of Ray that `farsight serve` starts: what must differ from Ray's defaults there."""

from __future__ import annotations

from service.cluster import haproxy_restart, loopback


def prepare() -> None:
    """Ray's `worker_process_setup_hook`."""
    loopback.listen()
    haproxy_restart.install()
