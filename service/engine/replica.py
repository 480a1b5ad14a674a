"""The parts of a replica's engine that its configuration decides on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.billing.tenants import Tenants
from service.config import Config
from service.planning.device_profile import DeviceProfile
from service.telemetry.energy import Meter
from service.telemetry.metrics import Metrics
from service.telemetry.recorder import RequestRecorder

if TYPE_CHECKING:
    import torch

    from service.billing.ledger import Ledger
    from service.billing.metering import UsageMeter


@dataclass(frozen=True, slots=True)
class ReplicaDevice:
    """The device of one replica, its measured speed, and its energy counter if there is one."""

    device: torch.device
    profile: DeviceProfile
    cpu_threads: int = 1
    meter: Meter | None = None


def recorder_for(config: Config, clock: Callable[[], float], hour_usd: float) -> RequestRecorder | None:
    """None if neither log lines nor traces are wanted. RuntimeError: traces are, and cannot be sent."""
    if config.otlp_endpoint is None:
        return RequestRecorder(config, clock, hour_usd, None) if config.request_log else None
    from service.telemetry.tracing import Tracing  # imports OpenTelemetry

    return RequestRecorder(config, clock, hour_usd, Tracing(config.otlp_endpoint, config.trace_ratio, clock))


def usage_meter(config: Config, tenants: Tenants, ledger: Ledger, metrics: Metrics, hour_usd: float) -> UsageMeter:
    from service.billing.metering import UsageMeter  # imports a database library, which not every engine needs

    return UsageMeter(config, tenants, ledger, metrics, hour_usd=hour_usd)
