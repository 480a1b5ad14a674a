"""Writes what Kubernetes needs of other files: `python scripts/manifests.py`, or `make manifests`.

Kustomize can neither patch inside a string nor read a file outside its folder; a test proves both copies current.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parents[1]
HEADER = "# Written by scripts/manifests.py from {source}; change that, then `make manifests`.\n"

SERVE = """apiVersion: ray.io/v1
kind: RayService
metadata:
  name: farsight
spec:
  serveConfigV2: |
"""
RULES = """apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: farsight
spec:
"""


def manifests(root: Path = ROOT) -> dict[Path, str]:
    """Each generated file with its text."""
    found = {}
    for target, head, source, depth in (
        ("deploy/kustomize/base/serve-config.yaml", SERVE, "deploy/serve.yaml", 4),
        ("deploy/monitoring/prometheusrule.yaml", RULES, "deploy/monitoring/rules.yml", 2),
    ):
        text = HEADER.format(source=source) + head + indent((root / source).read_text(), " " * depth)
        found[root / target] = text
    return found


if __name__ == "__main__":
    for path, text in manifests().items():
        path.write_text(text)
