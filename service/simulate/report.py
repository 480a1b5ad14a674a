"""What a simulated cluster would have done, in one row of numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from service.config import Config
from service.core.answer import cost_usd
from service.device import device_names, pick_device
from service.simulate.cluster import Arrival, Replica


@dataclass(frozen=True, slots=True)
class SimulationRow:
    """Seconds, shares and dollars of one number of replicas."""

    replicas: int
    short_p50_s: float
    short_p99_s: float
    long_p50_s: float
    long_p99_s: float
    refused: float  # of the requests
    refused_work: float  # of the predicted seconds
    used: float  # of the device time
    fairness: float  # Jain's index of the tenants' mean slowdowns: 1 = equal
    allocated_usd: float
    used_usd: float


def row(trace: Sequence[Arrival], cluster: Sequence[Replica], config: Config) -> SimulationRow:
    answered = [one for one in trace if one.refused is None]
    short = [one.latency_s for one in answered if one.predicted_s <= config.batch_budget_s]
    long = [one.latency_s for one in answered if one.predicted_s > config.batch_budget_s]
    busy_s = sum(replica.busy_s for replica in cluster)
    # until the last answer: who stays longer than there is work does so for nothing
    duration_s = max((one.finished_s for one in answered if one.finished_s is not None), default=0.0)
    whole_s = duration_s * len(cluster)
    work_s = sum(one.predicted_s for one in trace)
    refused_s = work_s - sum(one.predicted_s for one in answered)
    price = config.hour_usd(*device_names(pick_device(config.device)))
    return SimulationRow(
        replicas=len(cluster),
        short_p50_s=percentile(short, 0.5),
        short_p99_s=percentile(short, 0.99),
        long_p50_s=percentile(long, 0.5),
        long_p99_s=percentile(long, 0.99),
        refused=1 - len(answered) / len(trace),
        refused_work=refused_s / work_s if work_s else 0.0,
        used=busy_s / whole_s if whole_s else 0.0,
        fairness=jain(answered),
        allocated_usd=cost_usd(whole_s, price),
        used_usd=cost_usd(busy_s, price),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """nan where there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def jain(answered: Sequence[Arrival]) -> float:
    """Of the mean slowdown (latency over predicted time) of each tenant: (sum x)^2 / (n * sum x^2)."""
    slowdowns: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        slowdowns[one.tenant].append(one.latency_s / one.predicted_s)
    means = [sum(values) / len(values) for values in slowdowns.values()]
    return sum(means) ** 2 / (len(means) * sum(mean**2 for mean in means)) if means else 1.0
