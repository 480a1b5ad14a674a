"""Every metric of the service, in base units, with closed label sets. Registry injected; prefix `farsight_`.

A replica calls `share_files` first: each process then writes its own files, and `exporter` merges those of one node.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, values

from service.core import Answer, PlanKind
from service.errors import CODES, Kind

if TYPE_CHECKING:
    from service.engine.batch import Result

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SLICES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
ERRORS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
OUTPUT_ERRORS = (1e-6, 1e-5, *ERRORS)
AROUND_ONE = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


def share_files(directory: Path) -> None:
    """Keep this process's values in files of `directory` (prometheus_client's multiprocess mode)."""
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    # a replica never forks: its pid is looked up once, not at every increment
    pid = os.getpid()
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: pid)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Series:
    """The children that one kind of answer increments."""

    requests: Counter
    duration: Histogram
    queue_duration: Histogram
    device_seconds: Counter
    flops: Counter
    flops_dense: Counter
    pairs: Counter
    pairs_dense: Counter
    cost: Counter
    planned: Counter


class Metrics:
    """Fed by the engine (answers, failures, batches) and by the transports (what they refuse before the engine)."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"farsight_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"farsight_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests by the one answer they got.", "endpoint", "model", "plan", "code")
        self.duration = histogram("request_duration_seconds", "From arrival to answer.", SECONDS, "endpoint", "model")
        self.queue_duration = histogram("queue_duration_seconds", "From arrival to the device.", SECONDS, "endpoint")
        self.device_seconds = counter("device_seconds", "Device time, shared over a batch.", "model", "plan", "tenant")
        self.flops = counter("flops", "Floating-point operations.", "plan", "kind")
        self.pairs = counter("attention_pairs", "Query-key pairs.", "kind")
        self.cost = counter("cost_usd", "Used device time at the configured price.", "tenant", "model", "plan")
        self.saved = counter("saved_usd", "Predicted dense cost less actual cost of sparse answers.", "tenant", "model")
        self.peak_memory = Gauge(
            "farsight_peak_memory_bytes",
            "Most memory that a replica process has held.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.batch_requests = histogram("batch_requests", "Requests of one batch.", COUNTS)
        self.slice = histogram("slice_seconds", "Longest time that a run kept the device from others.", SLICES)
        self.paused = counter("paused_seconds", "Time that runs which had begun waited for shorter ones.")
        self.batch_tokens = histogram("batch_tokens", "Tokens of one batch.", TOKENS)
        self.density = histogram("sparse_density_ratio", "Share of pairs that sparse attention scored.", RATIOS)
        self.error = histogram("sparse_error_ratio", "Upper limit of the measured relative L2 error.", ERRORS)
        self.audit_output_error = histogram(
            "audit_output_error",
            "What sparse attention changed in an answer, by an exact run of the same request.",
            OUTPUT_ERRORS,
            "model",
            "measure",
        )
        self.fallbacks = counter("fallbacks", "Sparse answers replaced by exact ones.", "reason")
        self.padding = Gauge(
            "farsight_padding_ratio",
            "Positions that the last forward pass computed for nothing, as a share of its tokens.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.plans = counter("plans", "Plans that produced answers.", "plan", "reason")
        self.rejections = counter("rejections", "Requests refused.", "reason")
        self.queue_predicted_seconds = Gauge(
            "farsight_queue_predicted_seconds",
            "Predicted device seconds that wait.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.prediction = histogram("prediction_ratio", "Predicted over actual seconds of a run.", AROUND_ONE, "plan")

    def answered(self, endpoint: str, answer: Answer, tenant: str) -> None:
        plan, usage, error = answer.plan.kind.value, answer.usage, answer.error
        series = self._series(endpoint, answer.model, plan, tenant)
        series.requests.inc()
        series.duration.observe(answer.timing.total_s)
        series.queue_duration.observe(answer.timing.queue_s)
        series.device_seconds.inc(usage.device_s)
        series.flops.inc(usage.flops)
        series.flops_dense.inc(usage.flops_dense)
        series.pairs.inc(usage.pairs_scored)
        series.pairs_dense.inc(usage.pairs_dense)
        series.cost.inc(usage.cost_usd)
        if not error.fallback:
            series.planned.inc()
        else:
            self.fallbacks.labels("max_error").inc()
            self.plans.labels(plan, "fallback").inc()
        if answer.plan.kind is PlanKind.SPARSE:
            self.saved.labels(tenant, answer.model).inc(usage.saved_usd)
            self.error.observe(error.relative_l2_upper)
            if answer.density is not None:
                self.density.observe(answer.density)

    @lru_cache(1024)  # noqa: B019 (lives as long as the process, like the series themselves)
    def _series(self, endpoint: str, model: str, plan: str, tenant: str) -> Series:
        """Looked up once for each set of labels: `labels` costs more than the increment."""
        return Series(
            requests=self.requests.labels(endpoint, model, plan, "200"),
            duration=self.duration.labels(endpoint, model),
            queue_duration=self.queue_duration.labels(endpoint),
            device_seconds=self.device_seconds.labels(model, plan, tenant),
            flops=self.flops.labels(plan, "executed"),
            flops_dense=self.flops.labels(plan, "dense_equivalent"),
            pairs=self.pairs.labels("scored"),
            pairs_dense=self.pairs.labels("dense_equivalent"),
            cost=self.cost.labels(tenant, model, plan),
            planned=self.plans.labels(plan, "planned"),
        )

    def predicted(self, kind: PlanKind, predicted_s: float, used_s: float) -> None:
        """One run of the device: members of a batch share what is paid once, so only the whole can be compared."""
        if used_s > 0:
            self.prediction.labels(kind.value).observe(predicted_s / used_s)

    def failed(self, endpoint: str, model: str, kind: Kind, duration_s: float | None) -> None:
        self.requests.labels(endpoint, model, "none", str(CODES[kind].http)).inc()
        if duration_s is not None:
            self.duration.labels(endpoint, model).observe(duration_s)
        if kind not in (Kind.INTERNAL, Kind.CANCELLED):
            self.rejections.labels(kind.value).inc()

    def refused(self, endpoint: str, kind: Kind) -> None:
        """A request that a transport refused before the engine saw it."""
        self.failed(endpoint, "unknown", kind, None)

    def batch(self, results: Sequence[Result], queued_s: float) -> None:
        """One run of the device; members that were retried alone are batches of their own."""
        self.queue_predicted_seconds.set(queued_s)
        alone = [result for result in results if result.batch_requests == 1]
        for result in alone or results[:1]:
            self.batch_requests.observe(result.batch_requests)
            self.batch_tokens.observe(result.batch_tokens)
            self.slice.observe(result.slice_s)
            self.paused.inc(result.paused_s)
        # ru_maxrss is in KiB on Linux
        self.peak_memory.set(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
