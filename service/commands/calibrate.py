"""`farsight calibrate`: measures how fast attention runs on this device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from service.commands.terminal import console, device, settings

if TYPE_CHECKING:
    from service.planning.device_profile import DeviceProfile


def calibrate(
    short: Annotated[bool, typer.Option(help="Measure only what the first start of the service measures.")] = False,
) -> None:
    """Measure how fast attention runs on this device, for the planner's predictions. Under 3 minutes on 2 cores."""
    import torch
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn

    from service.planning.calibration import identity, measure
    from service.planning.profile_cache import exclusive, store

    config = settings()
    target = device(config)
    torch.set_num_threads(config.cpu_threads or os.cpu_count() or 1)
    directory = config.cache_dir.expanduser()
    with (
        exclusive(directory),
        Progress(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("", total=1.0)
        profile = measure(target, thorough=not short, progress=lambda share: progress.update(task, completed=share))
        progress.update(task, completed=1.0)
    path = store(profile, target, directory)
    console.print(_prediction_table(profile, identity(target)["device"]))
    console.print(f"saved to {path}", soft_wrap=True)


def _prediction_table(profile: DeviceProfile, device: str) -> Table:
    """Predicted seconds of causal attention with 8 heads of 64, by length, plan and dtype."""
    from service.core.options import AttentionOptions
    from service.core.plan import PlanKind
    from service.core.request import AttentionShape
    from service.planning.attention_cost import attention_features

    table = Table("keys", *(f"{kind} {dtype}" for dtype in ("float32", "bfloat16") for kind in PlanKind), title=device)
    options = AttentionOptions(is_causal=True)
    for length in (256, 1024, 4096, 16384, 65536, 262144):
        row = []
        for dtype in ("float32", "bfloat16"):
            shape = AttentionShape(1, 8, 8, length, length, 64, 64, dtype)
            for kind in PlanKind:
                features = attention_features(kind, shape, options)
                row.append(f"{profile.attention_s(kind, features, dtype):.3g} s")
        table.add_row(f"{length}", *row)
    return table
