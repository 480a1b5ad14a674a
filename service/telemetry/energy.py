"""Joules where a counter can be read, shared over the runs of the device like its time; nothing where there is none.

NVIDIA GPUs: NVML's total energy counter of the whole board. CPUs: RAPL, the package zones of `/sys/class/powercap`.
Both count whoever uses the hardware: another process on the same GPU or socket, and other replicas of this node on the
same CPU, are in the figure. NVML moves its counter every 20 to 100 ms: a shorter run may read 0 and its neighbour the
lump; sums over many runs are right. A part of a GPU (MIG) has no counter, and is not told the whole one's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("farsight")

POWERCAP = Path("/sys/class/powercap")
NVML_REFRESH_S = 0.005  # a read costs more than a short run, and the counter moves more rarely
JOULES_PER_KWH = 3.6e6


class NoMeter(Exception):
    """There is no counter for this device, or it cannot be read (any more)."""


class Meter(Protocol):
    """A counter of one device."""

    def read_j(self) -> float:
        """Joules so far, from any beginning; never falls. Raises NoMeter."""
        ...


def meter_for(device: torch.device) -> Meter | None:
    """The counter of torch's `device`; None, and a log line that says why, where there is none."""
    try:
        return nvml_meter(*_identity(device)) if device.type == "cuda" else Rapl(rapl_zones())
    except NoMeter as reason:
        logger.info("energy is not measured: %s", reason)
        return None


def carbon_g(joules: float | None, g_per_kwh: float | None) -> float | None:
    """Grams of CO2 equivalent; None where either is unknown."""
    return None if joules is None or g_per_kwh is None else joules / JOULES_PER_KWH * g_per_kwh


class Energy:
    """Whose the counted joules are: the innermost run's on the device, or nobody's (idle).

    Runs begin and end on the device thread, nested; anybody may read `idle_j`. All joules since this was made are in
    exactly one run or in `idle_j`. Once the counter fails nothing is told any more.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self._runs: list[float] = []
        self._idle_j = 0.0
        self._read_j: float | None = meter.read_j()

    def begin(self) -> None:
        """A run begins, inside of those that have begun."""
        with self._lock:
            self._settle()
            self._runs.append(0.0)

    def end(self) -> float | None:
        """Joules of the innermost run, those inside it left out."""
        with self._lock:
            self._settle()
            used_j = self._runs.pop()
            return None if self._read_j is None else used_j

    @property
    def idle_j(self) -> float | None:
        """Joules while no run had the device. To be read at least every few minutes: RAPL's counter wraps around."""
        with self._lock:
            self._settle()
            return None if self._read_j is None else self._idle_j

    def _settle(self) -> None:
        """What was counted since the last time belongs to who had the device until now."""
        if self._read_j is None:
            return
        try:
            now_j = self._meter.read_j()
        except NoMeter as reason:
            logger.warning("energy is not measured any more: %s", reason)
            self._read_j = None
            return
        if self._runs:
            self._runs[-1] += now_j - self._read_j
        else:
            self._idle_j += now_j - self._read_j
        self._read_j = now_j


# -- CPUs -------------------------------------------------------------------------------------------------------


def rapl_zones(powercap: Path = POWERCAP) -> list[Path]:
    """The package zones; what is inside of them (cores, uncore) is counted there already."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    return [zone for zone in zones if _text(zone / "name").startswith("package")]


class Rapl:
    """All packages of this machine; one that cannot be read makes the sum unknown."""

    def __init__(self, zones: Sequence[Path]) -> None:
        """Raises NoMeter."""
        if not zones:
            raise NoMeter("this machine shows no RAPL package zones")
        self._ranges_uj = [_number(_text(zone / "max_energy_range_uj")) for zone in zones]
        try:
            self._files = [os.open(zone / "energy_uj", os.O_RDONLY) for zone in zones]
        except OSError as error:  # for root only, since a side channel was found in it
            raise NoMeter(str(error)) from error
        self._last_uj = [self._counter_uj(file) for file in self._files]
        self._total_uj = 0

    def read_j(self) -> float:
        for index, file in enumerate(self._files):
            now_uj = self._counter_uj(file)
            moved_uj = now_uj - self._last_uj[index]
            self._total_uj += moved_uj if moved_uj >= 0 else moved_uj + self._ranges_uj[index]
            self._last_uj[index] = now_uj
        return self._total_uj / 1e6

    @staticmethod
    def _counter_uj(file: int) -> int:
        try:
            return _number(os.pread(file, 32, 0).decode())
        except OSError as error:
            raise NoMeter(str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise NoMeter(str(error)) from error


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise NoMeter(f"RAPL counts {text[:32]!r}") from None


# -- GPUs -------------------------------------------------------------------------------------------------------


def _identity(device: torch.device) -> tuple[str, str]:
    """(UUID, PCI bus id) of a CUDA device; its index says nothing outside of CUDA_VISIBLE_DEVICES."""
    import torch

    about: Any = torch.cuda.get_device_properties(device)
    return str(about.uuid), f"{about.pci_domain_id:08x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def nvml_meter(uuid: str, bus_id: str) -> Meter:
    """The counter of the GPU that CUDA calls `uuid`. Raises NoMeter."""
    try:
        import pynvml
    except ImportError as error:
        raise NoMeter("nvidia-ml-py is not installed (the extra `gpu`)") from error
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except pynvml.NVMLError:  # a part of a GPU has a UUID of its own, and the bus id of the whole
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        if _is_divided(pynvml, handle):
            raise NoMeter(f"GPU {bus_id} is divided (MIG), and its counter is the whole one's")
        meter = Nvml(pynvml, handle)
        meter.read_j()
    except pynvml.NVMLError as error:
        raise NoMeter(f"NVML: {error}") from error
    return meter


def _is_divided(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # most GPUs cannot be divided, and do not know the question
        return False


class Nvml:
    """One GPU's counter, read at most every few milliseconds."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._at_s, self._last_j = float("-inf"), 0.0

    def read_j(self) -> float:
        now_s = self._clock()
        if now_s - self._at_s >= NVML_REFRESH_S:
            try:
                self._last_j = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3  # mJ
            except self._nvml.NVMLError as error:
                raise NoMeter(f"NVML: {error}") from error
            self._at_s = now_s
        return self._last_j
