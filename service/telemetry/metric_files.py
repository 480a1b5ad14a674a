"""Metric files of one node: every process writes its own; files of ended processes are folded into an archive.

A process holds a lock on `<id>.alive` while it runs. The kernel releases it however the process ends, and an id is used
only once, so an ended process never looks alive, even after SIGKILL or if its pid is reused. Reading and folding hold
one lock of the directory: every count is seen exactly once. Only increments take no lock.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from service.disk import is_full
from service.telemetry.metric_values import ProcessFiles, document, entry, value_class

logger = logging.getLogger("farsight")

KEPT = ("counter", "histogram")  # kept after their process ends


def share_files(directory: Path) -> None:
    """Keep this process's values in files of `directory`; in memory while the disk is full.

    Raises OSError if files cannot be made there for another reason.
    """
    values.ValueClass = value_class(ProcessFiles(directory, locked))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, among all threads and processes of the node."""
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_used(directory: Path) -> bool:
    """A process has written here."""
    return (directory / "lock").exists()


def folded(directory: Path) -> list[str]:
    """Files that a scrape reads: those of running processes, and the archive of all others. Call under `locked`."""
    living = set()
    for file in directory.glob("*.alive"):
        if _is_held(file):
            living.add(file.stem)
    kept = [_archive(directory, kind, living) for kind in KEPT]
    for file in directory.glob("gauge_*.db"):
        if _process(file) not in living:
            file.unlink()
    for file in directory.glob("*.alive"):
        if file.stem not in living:
            file.unlink()
    # a file is empty until its blocks are allocated
    return [str(file) for file in (*directory.glob("*.db"), *filter(None, kept)) if file.stat().st_size]


def _is_held(file: Path) -> bool:
    with file.open() as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _process(file: Path) -> str:
    return file.stem.rsplit("_", 1)[1]


def _archive(directory: Path, kind: str, living: set[str]) -> Path | None:
    """The archive of one kind, after the files of ended processes were folded into it one by one.

    An archive's name contains the process of the file that was folded last, so a single rename both adds the file's
    values and marks them as added. Leftovers of a fold that was killed are removed here.
    """
    archives = sorted(directory.glob(f"archive/{kind}_*.db"))
    archive = archives[-1] if archives else None
    for older in archives[:-1]:
        older.unlink()
    if archive is not None:
        (directory / f"{kind}_{archive.stem.rsplit('-', 1)[1]}.db").unlink(missing_ok=True)
    for file in sorted(directory.glob(f"{kind}_*.db")):
        if _process(file) in living:
            continue
        try:
            archive = _fold(archive, file, kind)
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning("metric files of ended processes stay as they are: %s", error)
            break  # they are read as they are
    return archive


def _fold(archive: Path | None, file: Path, kind: str) -> Path:
    """A new archive with the values of `archive` and `file`, which are deleted."""
    sequence = int(_process(archive).split("-")[0]) + 1 if archive else 0
    merged: dict[str, float] = {}  # by series
    for source in filter(None, (archive, file)):
        if source.stat().st_size == 0:  # killed before it wrote anything
            continue
        for key, value, _, _ in MmapedDict.read_all_values_from_file(str(source)):  # type: ignore[no-untyped-call]
            merged[key] = merged.get(key, 0.0) + value
    new = file.parent / "archive" / "new"  # overwrites what a fold that was killed left
    new.parent.mkdir(exist_ok=True)
    try:
        new.write_bytes(document(b"".join(entry(key, value, 0.0) for key, value in merged.items())))
    except OSError:
        new.unlink(missing_ok=True)
        raise
    after = new.with_name(f"{kind}_{sequence:09d}-{_process(file)}.db")
    new.rename(after)  # from here on `file` is in the archive
    file.unlink()
    if archive is not None:
        archive.unlink()
    return after
