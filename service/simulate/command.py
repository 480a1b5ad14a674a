"""`farsight simulate`: a trace, priced on this device, through clusters of several sizes."""

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
from service.simulate.report import SimulationRow, row
from service.simulate.traces import KINDS, Entry


def entries(path: Path | None, kind: str, rate: float, count: int, model: str, seed: int) -> list[Entry]:
    """Raises ValueError or OSError that say what is wrong."""
    if path is not None:
        try:
            return list(traces.read(path))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from error
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    return list(traces.draw(kind, rate, count, model, seed))


def run(trace: Sequence[Entry], replicas: int, config: Config) -> SimulationRow:
    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    if not trace:
        raise ValueError("the trace has no requests")
    profile, models = _device(config, needs_models=any(one.model for one in trace))
    arrived = list(arrivals(trace, profile, models, config))
    return row(arrived, simulate(arrived, replicas, config, max_peak_bytes(profile, config)), config)


@lru_cache(1)
def _loaded(models: tuple[str, ...], cache: Path, settings: str) -> tuple[DeviceProfile, dict[str, ModelInfo]]:
    """Measured or read once for all sizes of the cluster."""
    from service.config import ModelConfig
    from service.device import pick_device
    from service.models.loading.load import LoadSettings
    from service.models.registry import Registry
    from service.planning.profile_cache import load_or_measure

    device = pick_device(settings)
    registry = Registry(LoadSettings(device, 1, 512))
    registry.set([ModelConfig.model_validate_json(one) for one in models])
    return load_or_measure(device, cache), {info.name: info for info in registry.infos()}


def _device(config: Config, *, needs_models: bool) -> tuple[DeviceProfile, dict[str, ModelInfo]]:
    models = tuple(one.model_dump_json() for one in config.models) if needs_models else ()
    return _loaded(models, config.cache_dir, config.device)


def table(rows: Sequence[SimulationRow], requests: int) -> Table:
    latencies = "short p50", "p99", "long p50", "p99"
    columns = "replicas", *latencies, "refused", "work", "used", "fair", "USD"
    title = f"{requests:,} requests, by this device's measured speed: seconds, shares, allocated USD"
    shown = Table(*columns, title=title, box=SIMPLE_HEAD)
    for one in rows:
        seconds = (one.short_p50_s, one.short_p99_s, one.long_p50_s, one.long_p99_s)
        shown.add_row(
            f"{one.replicas}",
            *(f"{value:.3g}" for value in seconds),
            f"{one.refused:.1%}",
            f"{one.refused_work:.1%}",
            f"{one.used:.0%}",
            f"{one.fairness:.3f}",
            f"{one.allocated_usd:.3g}",
        )
    return shown


def write_json(path: Path, rows: Sequence[SimulationRow]) -> None:
    path.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
