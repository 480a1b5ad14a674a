"""A small file system of its own, which can really be full, read-only, or writable again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BLOCK = bytes(4096)


@dataclass(frozen=True)
class Disk:
    """A mounted tmpfs."""

    root: Path

    def fill(self) -> None:
        """Take all of its room."""
        file = os.open(self.root / "filler", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def until_full() -> None:
            while True:
                os.write(file, BLOCK)

        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            until_full()
        os.close(file)

    def free(self) -> None:
        (self.root / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "farsight-test", root], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield Disk(root)
    subprocess.run(["umount", "--lazy", root], check=True)  # lazily: an engine may still have files open
