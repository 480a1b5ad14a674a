"""Device profiles on disk: measured once for a device and its software, read by every later start and replica."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.core.plan import PlanKind
from service.device import free_bytes
from service.planning.attention_cost import CostFeatures
from service.planning.calibration import DTYPES, VERSION, measure
from service.planning.device_profile import DeviceProfile

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("farsight")


def load_or_measure(device: torch.device, directory: Path) -> DeviceProfile:
    """The stored profile of this device, or a short measurement that is stored. One process of a node measures, the
    others wait for it: two at a time would measure each other."""
    try:
        directory = directory.expanduser()
        known = load(device, directory)
        if known is not None:
            return known
        with exclusive(directory):
            known = load(device, directory)  # by who was here first
            if known is None:
                known = measure(device)
                _try_to_store(known, device, directory)
            return known
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written
        logger.warning("calibration is not kept: %s", error)
        return measure(device)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Held by one process at a time; OSError where the directory cannot be written."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "calibration.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(device: torch.device, directory: Path) -> DeviceProfile | None:
    """None where nothing was stored for this device and software, or what was stored cannot be used."""
    path = path_of(device, directory)
    try:
        found = _from_document(json.loads(path.read_text())["profile"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("calibration in %s is measured again: %r", path, error)
        return None
    return replace(found, free_bytes=free_bytes(device))


def store(profile: DeviceProfile, device: torch.device, directory: Path) -> Path:
    path = path_of(device, directory)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"identity": identity(device), "profile": _document(profile)}, indent=1) + "\n")
    part.replace(path)  # a reader sees the old file or the new one
    return path


def _try_to_store(profile: DeviceProfile, device: torch.device, directory: Path) -> None:
    try:
        store(profile, device, directory)
    except OSError as error:
        logger.warning("calibration is not kept: %s", error)


def path_of(device: torch.device, directory: Path) -> Path:
    text = json.dumps(identity(device), sort_keys=True)
    return directory / f"calibration-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def identity(device: torch.device) -> dict[str, Any]:
    """What a measurement holds for."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "version": VERSION}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _document(profile: DeviceProfile) -> dict[str, Any]:
    seconds = {f"{kind} {dtype}": values for (kind, dtype), values in profile.attention_s_per.items()}
    linear = dict(profile.linear_flops_per_s)
    return {"device": profile.device, "attention_s_per": seconds, "linear_flops_per_s": linear}


def _from_document(document: dict[str, Any]) -> DeviceProfile:
    """ValueError where a figure is missing, not a number, or negative: every request would be priced with it."""
    seconds = {}
    for name, values in document["attention_s_per"].items():
        kind, _, dtype = name.partition(" ")
        seconds[PlanKind(kind), dtype] = tuple(float(value) for value in values)
    linear = {dtype: float(rate) for dtype, rate in document["linear_flops_per_s"].items()}
    for kind, dtype in product(PlanKind, DTYPES):
        found = seconds[kind, dtype]
        if len(found) != len(CostFeatures._fields) or not all(isfinite(value) and value >= 0 for value in found):
            raise ValueError(f"seconds of {kind} {dtype}: {found}")
        if not (isfinite(linear[dtype]) and linear[dtype] > 0):
            raise ValueError(f"FLOP/s of {dtype}: {linear[dtype]}")
    return DeviceProfile(document["device"], seconds, linear, free_bytes=0)
