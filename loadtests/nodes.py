"""A Ray cluster of several nodes on one machine: `python -m loadtests.nodes FOLDER`, as root, with iproute2.

Each node has its own namespaces for network, processes and Ray's files, and a link to the others, so Ray and HAProxy
see several machines. Input lines are those of loadtests.deployer, which runs on the head, and two more. `kill`: all
processes of the last node are killed (-9), and the kernel closes their connections. `unplug`: the link of the node is
cut first, so that no connection is closed, as when a machine loses power.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.servers.process import last_line
from service.cluster.environment import ray_environment
from service.config import Config

NODES = 3
NETWORK = "10.203.77"
PREFIX = "fsight"  # of links; their names have at most 15 characters
HEAD = f"{NETWORK}.11"
GCS_PORT = 6379
START_TIMEOUT_S = 60.0
BIN = Path(sys.executable).parent


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def remove_leftovers() -> None:
    """Remove links and namespaces of runs that were killed, which use the same addresses. Their names contain the id of
    the process that created them; exits if it is still running."""
    links = [path.name for path in Path("/sys/class/net").iterdir()]
    spaces = [path.name for path in Path("/run/netns").iterdir()] if Path("/run/netns").is_dir() else []
    for kind, names in (("netns", spaces), ("link", links)):
        for name in names:
            match = re.fullmatch(rf"{PREFIX}(\d+)(-\d)?", name)
            if match and psutil.pid_exists(int(match[1])):
                sys.exit(f"process {match[1]} already runs such a cluster on this machine")
            if match:
                ip(kind, "delete", name)


@contextmanager
def bridge(name: str) -> Iterator[str]:
    """Create the bridge that connects all links; processes of this machine reach the nodes through it."""
    ip("link", "add", name, "type", "bridge")
    try:
        ip("address", "add", f"{NETWORK}.1/24", "dev", name)
        ip("link", "set", name, "up")
        yield name
    finally:
        ip("link", "delete", name)


@contextmanager
def linked(name: str, address: str, bridge: str) -> Iterator[None]:
    """Create a network namespace with its own loopback and one link to the bridge."""
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", bridge, "up")
        for command in (["link", "set", "lo", "up"], ["link", "set", "eth0", "up"]):
            ip("-netns", name, *command)
        ip("-netns", name, "address", "add", f"{address}/24", "dev", "eth0")
        yield
    finally:
        ip("netns", "delete", name)


class Node:
    """`ray start` as process 1 of its namespaces: when it ends, all other processes of the node end."""

    def __init__(self, name: str, address: str, folder: Path, config: Config) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        own = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        options = own if address == HEAD else [f"--address={HEAD}:{GCS_PORT}"]
        # two CPUs: the replica of a lost node fits on the remaining nodes
        options += [f"--node-ip-address={address}", "--num-cpus=2", f"--object-store-memory={128 * 1024**2}", "--block"]
        # private to each node: Ray's and HAProxy's files, whose paths are the same on all nodes
        folders = f"/tmp/ray {config.haproxy_dir}"
        script = (
            f'set -e; mkdir -p {folders}; for folder in {folders}; do mount -t tmpfs tmpfs $folder; done; exec "$@"'
        )
        command = ["ip", "netns", "exec", name, "unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        self.environment = {**os.environ, **ray_environment(config), "FARSIGHT_STATE_DIR": str(folder / name)}
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                [*command, "sh", "-c", script, "sh", str(BIN / "ray"), "start", *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def init(self) -> psutil.Process:
        """Process 1 of the node, as seen from outside. Raises TimeoutError if the node did not start."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._outer.poll() is None and time.monotonic() < deadline_s:
            if children := psutil.Process(self._outer.pid).children():
                return children[0]
            time.sleep(0.05)
        raise TimeoutError(f"a node did not start: {last_line(self._log)}")

    @property
    def serves(self) -> bool:
        """Whether the node has a replica."""
        return any("ServeReplica" in "".join(process.cmdline()) for process in self.init.children(recursive=True))

    def kill(self) -> None:
        if self._outer.poll() is None:
            self.init.kill()
            self._outer.wait()


def main() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("nodes are network namespaces: expected root and iproute2")
    folder, config = Path(sys.argv[1]), Config()
    remove_leftovers()
    with ExitStack() as cleanup:
        own = cleanup.enter_context(bridge(f"{PREFIX}{os.getpid()}"))
        nodes = []
        for index in range(NODES):
            name, address = f"{own}-{index}", f"{NETWORK}.{11 + index}"
            cleanup.enter_context(linked(name, address, own))
            nodes.append(Node(name, address, folder, config))
            cleanup.callback(nodes[-1].kill)
            if index == 0:
                await_head()
        with in_namespaces_of(nodes[0], "-m", "loadtests.deployer", f"{HEAD}:{GCS_PORT}", f"{NODES}") as deployer:
            assert deployer.stdin is not None, "bug: opened without a pipe"
            assert deployer.stdout is not None, "bug: opened without a pipe"
            for line in sys.stdin:
                if line in ("kill\n", "unplug\n"):
                    if not nodes[-1].serves:
                        sys.exit("the last node has no replica: losing it would have no effect")
                    if line == "unplug\n":
                        ip("link", "set", nodes[-1].name, "down")
                    nodes[-1].kill()
                else:
                    deployer.stdin.write(line.encode())
                    deployer.stdin.flush()
                    if not any(answer == b"done\n" for answer in deployer.stdout):
                        sys.exit("the deployer ended")
                print("done", flush=True)


def await_head() -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with suppress(OSError), socket.create_connection((HEAD, GCS_PORT), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError("the head did not start")


@contextmanager
def in_namespaces_of(node: Node, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python process on the node; waits for its end."""
    command = ["nsenter", f"--target={node.init.pid}", "--mount", "--net", "--pid", sys.executable, *arguments]
    with subprocess.Popen(command, env=node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
