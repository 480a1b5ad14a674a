"""Writing to a disk that may be full: mapped files whose blocks exist, and files that are whole or absent."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError) -> bool:
    """The disk, or this user's share of it, has no room; there may be some later."""
    return error.errno in FULL


def map_allocated(file: int, size: int) -> mmap.mmap:
    """Map `size` bytes of an open file after all of their blocks were allocated.

    A write to a mapped page whose block cannot be allocated kills the process by SIGBUS. Raises OSError if there is no
    room, and the file keeps its size.
    """
    before = os.fstat(file).st_size
    try:
        os.posix_fallocate(file, 0, size)
        return mmap.mmap(file, size)
    except OSError:
        os.ftruncate(file, before)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one. Raises OSError and leaves nothing behind."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
