"""A small file system of its own, which can really be full, read-only, or writable again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def mounted(root: Path) -> Iterator[Disk]:
    """A disk of 24 MiB; the test is skipped where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "farsight-test", str(root)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"no file system can be mounted here: {ran.stderr.strip()}")
    yield Disk(root)
    subprocess.run(["umount", "--lazy", root], check=True)  # lazily: an engine may still have files open


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as disk:
        yield disk
