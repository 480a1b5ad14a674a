"""Device profiles on disk: measured once per device and software, then read by every later start and replica."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.core.plan import PlanKind
from service.disk import write_whole
from service.planning.attention_cost import CostFeatures
from service.planning.calibration import DTYPES, identity, measure
from service.planning.device_profile import DeviceProfile

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("farsight")


def load_or_measure(device: torch.device, directory: Path) -> DeviceProfile:
    """The stored profile of this device; if there is none, a short measurement, which is then stored.

    Only one process of a machine measures at a time, the others wait for its result: two at once would slow each other.
    """
    try:
        directory = directory.expanduser()
        known = load(device, directory)
        if known is not None:
            return known
        with exclusive(directory):
            known = load(device, directory)  # stored while this process waited
            if known is None:
                known = measure(device)
                _try_to_store(known, device, directory)
            return known
    except (OSError, RuntimeError) as error:  # no home directory, or it is not writable
        logger.warning("calibration not stored: %s", error)
        return measure(device)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """A lock that one process holds at a time. Raises OSError if the directory is not writable."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "calibration.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(device: torch.device, directory: Path) -> DeviceProfile | None:
    """The stored profile with the memory that is free now; None if nothing valid is stored for this device and
    software."""
    from service.device import free_bytes

    path = path_of(device, directory)
    try:
        found = _from_document(json.loads(path.read_text())["profile"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("calibration in %s not usable, measuring again: %r", path, error)
        return None
    return replace(found, free_bytes=free_bytes(device))


def store(profile: DeviceProfile, device: torch.device, directory: Path) -> Path:
    """Write the profile of this device and return its file. Raises OSError if the directory is not writable."""
    path = path_of(device, directory)
    write_whole(path, json.dumps({"identity": identity(device), "profile": _document(profile)}, indent=1) + "\n")
    return path


def path_of(device: torch.device, directory: Path) -> Path:
    """The file of this device and software, named by a hash of its identity."""
    text = json.dumps(identity(device), sort_keys=True)
    return directory / f"calibration-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _try_to_store(profile: DeviceProfile, device: torch.device, directory: Path) -> None:
    try:
        store(profile, device, directory)
    except OSError as error:
        logger.warning("calibration not stored: %s", error)


def _document(profile: DeviceProfile) -> dict[str, Any]:
    seconds = {f"{kind} {dtype}": values for (kind, dtype), values in profile.attention_s_per.items()}
    linear = dict(profile.linear_flops_per_s)
    return {"device": profile.device, "attention_s_per": seconds, "linear_flops_per_s": linear}


def _from_document(document: dict[str, Any]) -> DeviceProfile:
    """Raises ValueError or KeyError if a figure is missing, not a number or negative: it would misprice every
    request."""
    seconds = {}
    for name, values in document["attention_s_per"].items():
        kind, _, dtype = name.partition(" ")
        seconds[PlanKind(kind), dtype] = tuple(float(value) for value in values)
    linear = {dtype: float(rate) for dtype, rate in document["linear_flops_per_s"].items()}
    count = len(CostFeatures._fields)
    for kind, dtype in product(PlanKind, DTYPES):
        found = seconds[kind, dtype]
        if len(found) != count or not all(isfinite(value) and value >= 0 for value in found):
            raise ValueError(f"seconds of {kind} {dtype}: expected {count} numbers, none negative, got {found}")
        if not (isfinite(linear[dtype]) and linear[dtype] > 0):
            raise ValueError(f"FLOP/s of {dtype}: expected a positive number, got {linear[dtype]}")
    return DeviceProfile(document["device"], seconds, linear, free_bytes=0)
