"""The steps of `farsight simulate`: a trace, priced for this device, through clusters of several sizes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from service.config import Config
from service.core.model_info import ModelInfo
from service.planning.device_profile import DeviceProfile
from service.planning.planner import max_peak_bytes
from service.simulate import traces
from service.simulate.cluster import simulate
from service.simulate.pricing import arrivals
from service.simulate.report import SimulationRow, simulation_row
from service.simulate.traces import KINDS, Entry


def entries(path: Path | None, kind: str, rate: float, count: int, model: str, seed: int) -> list[Entry]:
    """The trace of a CSV file or, without one, a generated trace.

    Args:
        path: CSV file; if given, all other arguments are ignored.
        kind: arrivals of the generated trace, one of `traces.KINDS`.
        rate: mean requests per second.
        count: number of requests.
        model: model of the short requests.
        seed: of the random numbers.

    Raises ValueError if the file or `kind` is not usable, OSError if the file is not readable.
    """
    if path is not None:
        try:
            return list(traces.read(path))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from error
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return list(traces.draw(kind, rate, count, model, seed))


def run(trace: Sequence[Entry], replicas: int, config: Config) -> SimulationRow:
    """Simulate a trace on a cluster of this size.

    Raises ValueError if there are no replicas, no requests, or a model of the trace is not configured.
    """
    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    if not trace:
        raise ValueError("trace: expected at least 1 request, got 0")
    profile, models = _device(config, needs_models=any(entry.model for entry in trace))
    arrived = list(arrivals(trace, profile, models, config))
    return simulation_row(arrived, simulate(arrived, replicas, config, max_peak_bytes(profile, config)), config)


def table(rows: Sequence[SimulationRow], requests: int) -> Table:
    """One line per cluster size."""
    latencies = "short p50", "p99", "long p50", "p99"
    columns = "replicas", *latencies, "refused", "refused work", "used", "fairness", "USD"
    title = f"{requests:,} requests at this device's measured speed: seconds, shares, allocated USD"
    shown = Table(*columns, title=title, box=SIMPLE_HEAD)
    for row in rows:
        seconds = (row.short_p50_s, row.short_p99_s, row.long_p50_s, row.long_p99_s)
        shown.add_row(
            f"{row.replicas}",
            *(f"{value:.3g}" for value in seconds),
            f"{row.refused:.1%}",
            f"{row.refused_work:.1%}",
            f"{row.used:.0%}",
            f"{row.fairness:.3f}",
            f"{row.allocated_usd:.3g}",
        )
    return shown


def write_json(path: Path, rows: Sequence[SimulationRow]) -> None:
    """Write the rows as a JSON list. Raises OSError if the file is not writable."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _device(config: Config, *, needs_models: bool) -> tuple[DeviceProfile, dict[str, ModelInfo]]:
    models = tuple(model.model_dump_json() for model in config.models) if needs_models else ()
    return _loaded(models, config.cache_dir, config.device)


@lru_cache(1)
def _loaded(models: tuple[str, ...], cache: Path, device_name: str) -> tuple[DeviceProfile, dict[str, ModelInfo]]:
    """The profile of the device and the loaded models (as JSON), once for all cluster sizes."""
    from service.config import ModelConfig
    from service.device import pick_device
    from service.models.loading.load import LoadSettings
    from service.models.registry import Registry
    from service.planning.profile_cache import load_or_measure

    device = pick_device(device_name)
    registry = Registry(LoadSettings(device, 1, 512))
    registry.set([ModelConfig.model_validate_json(model) for model in models])
    return load_or_measure(device, cache), {info.name: info for info in registry.infos()}
