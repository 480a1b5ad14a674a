"""Runs checkov on every overlay and on the pods that KubeRay creates from it: `make checkov`.

Not part of `make test`: it needs 290 MB in its own venv, because its dependencies are not those of the service.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from tests.deploy import kinds
from tests.deploy.rendered import OVERLAYS, objects

CHECKOV = Path(__file__).parents[1] / ".tools/checkov/bin/checkov"
# skipped checks, with the reason
SKIPPED = {
    "CKV_K8S_15": "images are referenced by a digest or an immutable tag: no need to pull again",
    "CKV_K8S_35": "KubeRay reads the Redis password only from the environment, and the ledger URL is a setting",
    "CKV_K8S_38": "the autoscaler on the head of prod requests pods from Kubernetes; no other pod has a token",
    "CKV_K8S_40": "1000 is also the user of Ray's own images",
    "CKV_K8S_43": "operators set the digest of their own image (RUNBOOK)",
}


def main() -> None:
    with TemporaryDirectory() as folder:
        for overlay in OVERLAYS:
            found = objects(overlay)
            [cluster] = [document for document in found if document["kind"] == "RayService"]
            pods = [kinds.pod_of(group, cluster["metadata"]["namespace"]) for group in kinds.groups(cluster)]
            (Path(folder) / f"{overlay}.yaml").write_text(yaml.safe_dump_all([*found, *pods]))
        options = f"--framework kubernetes --compact --quiet --skip-download --skip-check {','.join(SKIPPED)}"
        sys.exit(subprocess.run([CHECKOV, *options.split(), "--directory", folder], check=False).returncode)


if __name__ == "__main__":
    main()
