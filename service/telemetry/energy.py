"""Joules of a device with an energy counter, split among its runs and its idle time. No counter: no figures.

NVIDIA GPUs: NVML's total energy counter of the whole board. CPUs: RAPL, the package zones of `/sys/class/powercap`.
Both count the hardware: other processes on the same GPU or socket, and other replicas of this node on the same CPU, are
included. NVML updates its counter every 20 to 100 ms: a shorter run may read 0, and the next one the sum of both; sums
over many runs are right. A part of a GPU (MIG) has no counter of its own, and the whole GPU's is not used for it.
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
NVML_REFRESH_S = 0.005  # a read costs more than a short run, and the counter is updated less often
JOULES_PER_KWH = 3.6e6


class NoMeter(Exception):
    """This device has no energy counter, or it cannot be read."""


class Meter(Protocol):
    """An energy counter of one device."""

    def read_j(self) -> float:
        """Joules so far, from an arbitrary start; never decreases. Raises NoMeter."""
        ...


def meter_for(device: torch.device) -> Meter | None:
    """The counter of torch's `device`. None if it has none; a log line says why."""
    try:
        return nvml_meter(*_identity(device)) if device.type == "cuda" else Rapl(rapl_zones())
    except NoMeter as reason:
        logger.info("energy is not measured: %s", reason)
        return None


def carbon_g(joules: float | None, g_per_kwh: float | None) -> float | None:
    """Grams of CO2 equivalent; None if either argument is unknown."""
    return None if joules is None or g_per_kwh is None else joules / JOULES_PER_KWH * g_per_kwh


class Energy:
    """Assigns counted joules to the innermost run on the device or, without a run, to idle time.

    Runs begin and end on the device thread and may be nested; any thread may read `idle_j`. Each joule since the
    construction is in exactly one run or in `idle_j`. After the counter has failed once, all results are None.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self._runs: list[float] = []
        self._idle_j = 0.0
        self._read_j: float | None = meter.read_j()

    def begin(self) -> None:
        """Start a run, nested in the runs that have not ended."""
        with self._lock:
            self._settle()
            self._runs.append(0.0)

    def end(self) -> float | None:
        """End the innermost run. Returns its joules, without those of runs nested in it; None: unknown."""
        with self._lock:
            self._settle()
            used_j = self._runs.pop()
            return None if self._read_j is None else used_j

    @property
    def idle_j(self) -> float | None:
        """Joules without a run; None: unknown. Read it at least every few minutes: RAPL's counter wraps around."""
        with self._lock:
            self._settle()
            return None if self._read_j is None else self._idle_j

    def _settle(self) -> None:
        """Assign what was counted since the last call to the current owner of the device."""
        if self._read_j is None:
            return
        try:
            now_j = self._meter.read_j()
        except NoMeter as reason:
            logger.warning("energy is no longer measured: %s", reason)
            self._read_j = None
            return
        if self._runs:
            self._runs[-1] += now_j - self._read_j
        else:
            self._idle_j += now_j - self._read_j
        self._read_j = now_j


# -- CPUs -------------------------------------------------------------------------------------------------------


def rapl_zones(powercap: Path = POWERCAP) -> list[Path]:
    """The package zones of RAPL; they include their subzones (cores, uncore)."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    return [zone for zone in zones if _text(zone / "name").startswith("package")]


class Rapl:
    """The sum of all packages of this machine; unknown if one of them cannot be read."""

    def __init__(self, zones: Sequence[Path]) -> None:
        """Open the counters of `zones`. Raises NoMeter if there are none, or one cannot be read."""
        if not zones:
            raise NoMeter("this machine has no RAPL package zones")
        self._ranges_uj = [_number(_text(zone / "max_energy_range_uj")) for zone in zones]
        try:
            self._files = [os.open(zone / "energy_uj", os.O_RDONLY) for zone in zones]
        except OSError as error:  # readable by root only, since it was found to be a side channel
            raise NoMeter(str(error)) from error
        self._last_uj = [self._counter_uj(file) for file in self._files]
        self._total_uj = 0

    def read_j(self) -> float:
        """Joules since the construction, over counters that wrap around. Raises NoMeter."""
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
        raise NoMeter(f"RAPL: expected a number, got {text[:32]!r}") from None


# -- GPUs -------------------------------------------------------------------------------------------------------


def _identity(device: torch.device) -> tuple[str, str]:
    """(UUID, PCI bus id) of a CUDA device; its index depends on CUDA_VISIBLE_DEVICES."""
    import torch

    about: Any = torch.cuda.get_device_properties(device)
    return str(about.uuid), f"{about.pci_domain_id:08x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def nvml_meter(uuid: str, bus_id: str) -> Meter:
    """The counter of the GPU with CUDA's `uuid`, or else with `bus_id`. Raises NoMeter."""
    try:
        import pynvml
    except ImportError as error:
        raise NoMeter("nvidia-ml-py is not installed (the extra `gpu`)") from error
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except pynvml.NVMLError:  # a part of a GPU has its own UUID, and the bus id of the GPU
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        if _is_divided(pynvml, handle):
            raise NoMeter(f"GPU {bus_id} is divided (MIG); its counter covers all parts")
        meter = Nvml(pynvml, handle)
        meter.read_j()
    except pynvml.NVMLError as error:
        raise NoMeter(f"NVML: {error}") from error
    return meter


def _is_divided(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # most GPUs cannot be divided, and NVML reports an error for them
        return False


class Nvml:
    """The counter of one GPU, read at most every NVML_REFRESH_S."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._at_s, self._last_j = float("-inf"), 0.0

    def read_j(self) -> float:
        """Joules since the driver was loaded. Raises NoMeter."""
        now_s = self._clock()
        if now_s - self._at_s >= NVML_REFRESH_S:
            try:
                self._last_j = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3  # mJ
            except self._nvml.NVMLError as error:
                raise NoMeter(f"NVML: {error}") from error
            self._at_s = now_s
        return self._last_j
