"""The results of a simulated cluster in one row of figures."""

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
    """Latencies, shares and dollars of one cluster size."""

    replicas: int
    short_p50_s: float
    short_p99_s: float
    long_p50_s: float
    long_p99_s: float
    refused: float  # share of the requests
    refused_work: float  # share of the predicted seconds
    used: float  # share of the device time
    fairness: float  # Jain's index of the tenants' mean slowdowns: 1 = equal
    allocated_usd: float
    used_usd: float


def simulation_row(trace: Sequence[Arrival], cluster: Sequence[Replica], config: Config) -> SimulationRow:
    """The figures of a simulated trace. Work over `config.batch_budget_s` is long; latencies are in seconds.

    Device time is counted until the last answer.
    """
    answered = [arrival for arrival in trace if arrival.refused is None]
    short = [arrival.latency_s for arrival in answered if arrival.predicted_s <= config.batch_budget_s]
    long = [arrival.latency_s for arrival in answered if arrival.predicted_s > config.batch_budget_s]
    busy_s = sum(replica.busy_s for replica in cluster)
    duration_s = max((arrival.finished_s for arrival in answered if arrival.finished_s is not None), default=0.0)
    allocated_s = duration_s * len(cluster)
    work_s = sum(arrival.predicted_s for arrival in trace)
    refused_s = work_s - sum(arrival.predicted_s for arrival in answered)
    hour_usd = config.hour_usd(*device_names(pick_device(config.device)))
    return SimulationRow(
        replicas=len(cluster),
        short_p50_s=percentile(short, 0.5),
        short_p99_s=percentile(short, 0.99),
        long_p50_s=percentile(long, 0.5),
        long_p99_s=percentile(long, 0.99),
        refused=1 - len(answered) / len(trace),
        refused_work=refused_s / work_s if work_s else 0.0,
        used=busy_s / allocated_s if allocated_s else 0.0,
        fairness=jain_index(answered),
        allocated_usd=cost_usd(allocated_s, hour_usd),
        used_usd=cost_usd(busy_s, hour_usd),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value at this share (0 to 1) of the sorted values; nan if there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def jain_index(answered: Sequence[Arrival]) -> float:
    """Fairness between tenants: (sum x)^2 / (n * sum x^2) of their mean slowdowns x (latency over predicted time).

    Ref: Jain, Chiu and Hawe, A Quantitative Measure of Fairness and Discrimination (1984).
    """
    slowdowns: dict[str, list[float]] = defaultdict(list)
    for arrival in answered:
        slowdowns[arrival.tenant].append(arrival.latency_s / arrival.predicted_s)
    means = [sum(values) / len(values) for values in slowdowns.values()]
    return sum(means) ** 2 / (len(means) * sum(mean**2 for mean in means)) if means else 1.0
