"""The second half of `make image-test`: runs a built root file system like a container, and tests the service in it.

scripts/image_test.sh starts it as process 1 of new namespaces (mounts, processes, network), which end with it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

READY_S = 240.0
STOP_S = 90.0
SHM = "256m"  # as in the Dockerfile's `docker run`
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "ld", "make")


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def make_container(root: Path, home: Path, uid: str, gid: str) -> None:
    """Mount a read-only root; only /tmp, /dev/shm and the user's home are writable, as in deploy/kustomize."""
    mount("--bind", root, root)
    mount("-o", "remount,bind,ro", root)
    mount("-t", "proc", "proc", root / "proc")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "dev")
    for device in ("null", "zero", "full", "random", "urandom"):
        (root / "dev" / device).touch()
        mount("--bind", Path("/dev") / device, root / "dev" / device)
    (root / "dev/shm").mkdir()
    mount("-t", "tmpfs", "-o", f"mode=1777,size={SHM}", "tmpfs", root / "dev/shm")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp")
    mount("-t", "tmpfs", "-o", f"mode=700,uid={uid},gid={gid}", "tmpfs", root / home.relative_to("/"))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


class Container:
    """Runs commands with the image's user, environment and directory, without capabilities or a way to gain any."""

    def __init__(self, root: Path, config: dict[str, Any]) -> None:
        self._prefix = ["setpriv", "--no-new-privs", "chroot", f"--userspec={config['User']}", str(root)]
        self._prefix += ["env", "-i", f"--chdir={config['WorkingDir']}", f"HOME={config['WorkingDir']}", *config["Env"]]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._prefix, *command])

    def ask(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._prefix, *command], capture_output=True, text=True, check=False)


def check(name: str, passed: bool, detail: object = "") -> None:
    print(f"{'ok' if passed else 'FAILED'}: {name} {detail}".rstrip(), flush=True)
    if not passed:
        sys.exit(1)


def main() -> None:
    root, config = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())["Docker"]["config"]
    uid, _, gid = config["User"].partition(":")
    check("user is a number, not root", uid.isdigit() and gid.isdigit() and "0" not in (uid, gid), config["User"])
    labels = config["Labels"]
    check("labels", labels["org.opencontainers.image.title"] == "farsight" and labels["farsight.device"] == "cpu")
    make_container(root, Path(config["WorkingDir"]), uid, gid)
    container = Container(root, config)

    identity = container.ask(["id", "-u"]).stdout.strip()
    check("runs as that user", identity == uid, identity)
    errors = [container.ask(["touch", f"{path}/x"]).stderr for path in ("/", "/opt/farsight", "/etc", "/usr/bin")]
    check("the root file system is read-only", all("Read-only file system" in error for error in errors))
    rights = container.ask(["grep", "-E", "^(CapEff|NoNewPrivs):", "/proc/self/status"]).stdout.split()
    check("no capabilities, and no way to any", rights == ["CapEff:", "0" * 16, "NoNewPrivs:", "1"], rights)
    found = {name: container.ask(["bash", "-c", f"command -v {name}"]).stdout for name in (*COMPILERS, "wget")}
    check("wget is found, and no compiler", [name for name in found if found[name]] == ["wget"])
    conflicts = container.ask(["pip", "check"])
    check("pip check", conflicts.returncode == 0, conflicts.stdout.strip())

    health = config["Healthcheck"]["Test"]
    check("health check is a command", health[0] == "CMD", health)
    begun = time.monotonic()
    service = container.start(config["Cmd"])
    while container.ask(health[1:]).returncode:
        if service.poll() is not None or time.monotonic() - begun > READY_S:
            check("healthy by the image's own health check", False, f"status {service.poll()}")
        time.sleep(0.5)
    check("healthy by the image's own health check", True, f"after {time.monotonic() - begun:.0f} s")
    written = container.ask(["grep", "-rch", "--include=haproxy.cfg", "tcp-ut", "/tmp"]).stdout.split()
    check("HAProxy has farsight-haproxy's configuration", any(int(count) > 0 for count in written), written)

    with TemporaryDirectory() as results:
        load = [sys.executable, "-m", "loadtests", "--url", "http://127.0.0.1:8000", "--directory", results]
        check("the smoke load passes", subprocess.run(load, check=False).returncode == 0)
    service.send_signal(signal.SIGTERM)
    status = service.wait(STOP_S)
    check("ends on SIGTERM", status == 0, f"status {status}")


if __name__ == "__main__":
    main()
