"""Files on a disk that is full: whole, as they were, or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from service.disk import map_allocated, write_whole
from tests.disks import Disk, disk

__all__ = ["disk"]

FULL = os.strerror(errno.ENOSPC)


def test_what_cannot_be_mapped_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that allocates a part before it reports that it is full."""

    def allocate(file: int, start: int, size: int) -> None:
        os.ftruncate(file, size // 2)
        raise OSError(errno.ENOSPC, "no space left")

    path = tmp_path / "file"
    path.write_bytes(b"kept")
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with path.open("r+b") as file, pytest.raises(OSError, match="no space left"):
        map_allocated(file.fileno(), 4096)
    assert path.read_bytes() == b"kept"


def test_a_whole_file_or_none(disk: Disk) -> None:
    path = disk.root / "cache" / "file.json"
    write_whole(path, "first")
    disk.fill()
    with pytest.raises(OSError, match=FULL):
        write_whole(path, "second" * 10_000)
    assert path.read_text() == "first"
    assert [found.name for found in path.parent.iterdir()] == ["file.json"]
    disk.free()
    write_whole(path, "second")
    assert path.read_text() == "second"


def test_a_mapping_fits_or_the_file_keeps_its_size(disk: Disk) -> None:
    with (disk.root / "file").open("w+b") as file:
        map_allocated(file.fileno(), 4096)[:4] = b"kept"
        disk.fill()
        with pytest.raises(OSError, match=FULL):
            map_allocated(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_size == 4096
        disk.free()
        assert map_allocated(file.fileno(), 1 << 20)[:4] == b"kept"
