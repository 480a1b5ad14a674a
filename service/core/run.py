"""What a run on the device was: its times, its pauses, and each request's share of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run on the device. Times are seconds on the engine's clock."""

    started_s: float
    ended_s: float
    pauses: tuple[tuple[float, float], ...]  # (start_s, end_s) of the first ones, while other work had the device
    paused_s: float  # all pauses
    batch_requests: int
    is_failed: bool


@dataclass(frozen=True, slots=True)
class RunStats:
    """One request's part of the runs that it was in; the shares of a batch add up to the measured whole."""

    started_s: float  # of the last run
    device_s: float
    batch_requests: int
    batch_tokens: int
    paused_s: float = 0.0  # between start and end, while other work had the device
    slice_s: float = 0.0  # longest time between two checkpoints
    joules: float | None = None  # None: energy is not measured on this device
    runs: tuple[RunRecord, ...] = ()  # failed attempts first, then the run that answers
