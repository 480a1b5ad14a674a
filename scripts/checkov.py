"""checkov on every overlay and on the pods that KubeRay makes of it: `make checkov`.

Not a part of `make test`: it is 290 MB in a venv of its own, for what it needs is not what the service needs.
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
# what is not done, and why
SKIPPED = {
    "CKV_K8S_15": "an image is named by a digest or tag that never moves: nothing to pull again",
    "CKV_K8S_35": "KubeRay takes the password of Redis only from the environment, the ledger's URL is a setting",
    "CKV_K8S_38": "the autoscaler on prod's head asks Kubernetes for pods; no other pod has a token",
    "CKV_K8S_40": "1000 is the user of Ray's own images, too",
    "CKV_K8S_43": "the digest is that of the operator's own image (RUNBOOK)",
}


def main() -> None:
    with TemporaryDirectory() as folder:
        for overlay in OVERLAYS:
            found = objects(overlay)
            [cluster] = [one for one in found if one["kind"] == "RayService"]
            pods = [kinds.pod_of(group, cluster["metadata"]["namespace"]) for group in kinds.groups(cluster)]
            (Path(folder) / f"{overlay}.yaml").write_text(yaml.safe_dump_all([*found, *pods]))
        options = f"--framework kubernetes --compact --quiet --skip-download --skip-check {','.join(SKIPPED)}"
        sys.exit(subprocess.run([CHECKOV, *options.split(), "--directory", folder], check=False).returncode)


if __name__ == "__main__":
    main()
