"""Runs first in every process of Ray that `farsight serve` starts: what must differ from Ray's defaults there."""

from __future__ import annotations

import os

from service.cluster import haproxy_restart, loopback

DIRECTORY = "DIRECTORY_OF_FARSIGHT"  # in which the command runs: settings may be paths relative to it


def prepare() -> None:
    """Ray's `worker_process_setup_hook`."""
    os.chdir(os.environ.get(DIRECTORY, "."))
    loopback.listen()
    haproxy_restart.install()
