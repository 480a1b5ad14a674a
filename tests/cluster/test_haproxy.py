"""Ray's configuration of HAProxy is completed, and only Ray's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from service.cluster.environment import SCRIPTS
from service.cluster.haproxy import KEEPALIVE, completed

CONFIG = """global
    maxconn 4096
defaults
    mode http
frontend prometheus
    bind :9101
backend a
    default-server fastinter 250ms fall 2 check
    server one 10.0.0.1:8001 check observe layer4 error-limit 3 on-error mark-down
    server two 10.0.0.2:9001 proto h2 check
    server other 10.0.0.3:8000 check backup
listen stats
  bind *:8404
  stats enable
"""
TIMEOUTS = "".join(f"    timeout {what} 1s\n" for what in ("connect", "client", "server"))


def test_every_server_and_the_keepalive() -> None:
    lines = completed(CONFIG).splitlines()
    assert [line for line in lines if "tcp-ut" in line] == [
        "    server one 10.0.0.1:8001 check tcp-ut 10s observe layer4 error-limit 3 on-error mark-down",
        "    server two 10.0.0.2:9001 proto h2 check tcp-ut 10s",
        "    server other 10.0.0.3:8000 check tcp-ut 10s backup",
    ]
    assert "defaults\n" + KEEPALIVE + "    mode http\n" in completed(CONFIG)


def test_statistics_listen_on_loopback_and_metrics_on_the_given_host() -> None:
    assert [line.strip() for line in completed(CONFIG).splitlines() if "bind" in line] == [
        "bind :9101",
        "bind 127.0.0.1:8404",
    ]
    assert "    bind 10.0.0.9:9101\n" in completed(CONFIG, "10.0.0.9")


def test_the_template_of_this_ray_takes_both() -> None:
    template = completed(HAPROXY_CONFIG_TEMPLATE)
    assert template.count("srvtcpka-idle") == 1
    servers = [line for line in template.splitlines() if line.strip().startswith("server ") and " check" in line]
    assert len(servers) >= 5
    assert all("tcp-ut 10s" in line for line in servers)


def test_the_command_completes_the_file_and_becomes_haproxy(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(CONFIG.replace("mode http\n", f"mode http\n{TIMEOUTS}"))
    command = [SCRIPTS / "farsight-haproxy", "-c", "-f", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Configuration file is valid" in done.stdout
    assert path.read_text().count("tcp-ut 10s") == 3


def test_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected '.ndefaults.n' once, got 0 times"):
        completed("frontend only\n")
