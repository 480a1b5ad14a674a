"""Every metric of the service, in base units, with closed label sets. Registry injected; prefix `farsight_`.

One file because whoever adds or looks for a series should find all of them. A replica calls `metric_files.share_files`
first: each process then writes its own files, and `exporter` merges those of
one node.
"""

from __future__ import annotations

import resource
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import psutil
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from service.core.answer import Answer
from service.core.plan import PlanKind
from service.core.run import RunStats
from service.errors import CODES, Kind

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SLICES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
ERRORS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
OUTPUT_ERRORS = (1e-6, 1e-5, *ERRORS)
AROUND_ONE = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
# tokens of one request, up to and including; the last label is "more". A failed request has none: "unknown"
LENGTHS = (512, 4096, 32768, 262144)
LENGTH_LABELS = (*map(str, LENGTHS), "more")
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit_bytes() -> int:
    """What the processes of this machine or container may hold together: its cgroup's limit, else all memory."""
    limits = [int(psutil.virtual_memory().total)]
    for file in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # of the other version of cgroups, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


@dataclass(frozen=True, slots=True)
class Series:
    """The children that one kind of answer increments."""

    requests: Counter
    duration: Histogram
    queue_duration: Histogram
    flops: Counter
    flops_dense: Counter
    pairs: Counter
    pairs_dense: Counter
    tokens: Counter
    saved: Counter
    planned: Counter


Mode = Literal["livesum", "livemax", "livemin", "livemostrecent"]


class _Definitions:
    """Makes metrics in one registry, with the service's prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"farsight_{name}", text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"farsight_{name}", text, labels, registry=self._registry, buckets=buckets)

    def gauge(self, name: str, text: str, mode: Mode, *labels: str) -> Gauge:
        return Gauge(f"farsight_{name}", text, labels, registry=self._registry, multiprocess_mode=mode)


class Metrics:
    """Fed by the engine (answers, failures, batches) and by the transports (what they refuse before the engine).

    Labels come from closed sets: callers give tenants as `Tenants.label` and models as `Workload.label` name them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        define = self._define = _Definitions(registry)
        self._define_requests(define)
        self._define_money(define)
        self._define_runs(define)
        self._define_memory(define)
        self.memory_limit.set(memory_limit_bytes())
        self.report_memory()

    def _define_requests(self, define: _Definitions) -> None:
        self.requests = define.counter(
            "requests", "Requests by the one answer they got.", "endpoint", "model", "plan", "code"
        )
        self.duration = define.histogram(
            "request_duration_seconds", "From arrival to answer.", SECONDS, "endpoint", "model", "length"
        )
        self.queue_duration = define.histogram(
            "queue_duration_seconds", "From arrival to the device.", SECONDS, "endpoint"
        )
        self.flops = define.counter("flops", "Floating-point operations.", "plan", "kind")
        self.pairs = define.counter("attention_pairs", "Query-key pairs.", "kind")
        self.tokens = define.counter("tokens", "Tokens that were computed.", "tenant", "model", "plan")
        self.density = define.histogram("sparse_density_ratio", "Share of pairs that sparse attention scored.", RATIOS)
        self.error = define.histogram("sparse_error_ratio", "Upper limit of the measured relative L2 error.", ERRORS)
        self.audit_output_error = define.histogram(
            "audit_output_error",
            "What sparse attention changed in an answer, by an exact run of the same request.",
            OUTPUT_ERRORS,
            "model",
            "measure",
        )
        self.audit_reported_error = define.histogram(
            "audit_reported_error",
            "Upper limit that answers reported for their last hidden state, of those that were audited.",
            OUTPUT_ERRORS,
            "model",
        )
        self.audit_exceeded = define.counter(
            "audit_exceeded", "Audited answers whose last hidden state was further off than reported.", "model"
        )
        self.fallbacks = define.counter("fallbacks", "Sparse answers replaced by exact ones.", "reason")
        self.plans = define.counter("plans", "Plans that produced answers.", "plan", "reason")
        self.rejections = define.counter("rejections", "Requests refused.", "reason")

    def _define_money(self, define: _Definitions) -> None:
        self.device_seconds = define.counter(
            "device_seconds", "Device time, shared over a batch.", "model", "plan", "tenant"
        )
        self.host_seconds = define.counter(
            "host_seconds", "Seconds of cores for reading requests and writing answers.", "kind", "tenant"
        )
        self.cost = define.counter(
            "cost_usd", "Used device time and host work at the configured prices.", "tenant", "model", "plan"
        )
        self.saved = define.counter(
            "saved_usd", "Predicted dense cost less actual cost of sparse answers.", "tenant", "model"
        )
        self.allocated_cost = define.counter(
            "allocated_cost_usd", "Wall time of devices at the configured price, used or not, and host work."
        )
        self.idle_seconds = define.counter("device_idle_seconds", "Time that the device had nothing to do.")
        self.energy = define.counter(
            "energy_joules", "Measured energy, shared over a batch.", "tenant", "model", "plan"
        )
        self.budget_used_ratio = define.gauge(
            "budget_used_ratio", "Spent of a budget, as a share of it.", "livemostrecent", "tenant", "budget"
        )
        self.refused_by_budget = define.counter(
            "budget_refused", "Requests refused because a budget was spent.", "tenant"
        )
        self.ledger_pending = define.gauge(
            "ledger_pending_rows", "Rows of the ledger that are not written yet.", "livesum"
        )
        self.ledger_errors = define.counter("ledger_errors", "Writes of the ledger that failed.")

    def _define_runs(self, define: _Definitions) -> None:
        self.batch_requests = define.histogram("batch_requests", "Requests of one batch.", COUNTS)
        self.batch_tokens = define.histogram("batch_tokens", "Tokens of one batch.", TOKENS)
        self.slice = define.histogram("slice_seconds", "Longest time that a run kept the device from others.", SLICES)
        self.paused = define.counter("paused_seconds", "Time that runs which had begun waited for shorter ones.")
        self.padding = define.gauge(
            "padding_ratio",
            "Positions that the last forward pass computed for nothing, as a share of its tokens.",
            "livemax",
        )
        self.queue_predicted_seconds = define.gauge(
            "queue_predicted_seconds", "Predicted device seconds that wait.", "livesum"
        )
        self.prediction = define.histogram(
            "prediction_ratio", "Predicted over actual seconds of a run.", AROUND_ONE, "plan"
        )

    def _define_memory(self, define: _Definitions) -> None:
        self.resident_memory = define.gauge("resident_memory_bytes", "What the replica processes hold now.", "livesum")
        self.memory_limit = define.gauge(
            "memory_limit_bytes", "What the processes of this node may hold together.", "livemin"
        )
        self.peak_memory = define.gauge("peak_memory_bytes", "Most memory that a replica process has held.", "livemax")

    @cached_property
    def idle_energy(self) -> Counter:
        """Made when it is first measured: a missing counter does not mean zero."""
        return self._define.counter("idle_energy_joules", "Measured energy of the idle device.")

    def answered(self, endpoint: str, answer: Answer, tenant: str) -> None:
        plan, usage, error = answer.plan.kind.value, answer.usage, answer.error
        length = LENGTH_LABELS[bisect_left(LENGTHS, usage.tokens)]
        series = self._series(endpoint, answer.model, plan, tenant, length)
        series.requests.inc()
        series.duration.observe(answer.timing.total_s)
        series.queue_duration.observe(answer.timing.queue_s)
        series.flops.inc(usage.flops)
        series.flops_dense.inc(usage.flops_dense)
        series.pairs.inc(usage.pairs_scored)
        series.pairs_dense.inc(usage.pairs_dense)
        series.tokens.inc(usage.tokens)
        if not error.fallback:
            series.planned.inc()
        else:
            self.fallbacks.labels("max_error").inc()
            self.plans.labels(plan, "fallback").inc()
        if answer.plan.kind is PlanKind.SPARSE:
            series.saved.inc(usage.saved_usd)
            self.error.observe(error.relative_l2_upper)
            if answer.density is not None:
                self.density.observe(answer.density)

    def audited_states(self, model: str, error: float, reported: float) -> None:
        """The last hidden state of one sparse answer: how far off it was, and what the answer reported."""
        self.audit_output_error.labels(model, "last_hidden_state").observe(error)
        self.audit_reported_error.labels(model).observe(reported)
        self.audit_exceeded.labels(model).inc(error > reported)

    @lru_cache(4096)  # noqa: B019 (lives as long as the process, like the series themselves)
    def _series(self, endpoint: str, model: str, plan: str, tenant: str, length: str) -> Series:
        """Looked up once for each set of labels: `labels` costs more than the increment."""
        return Series(
            requests=self.requests.labels(endpoint, model, plan, "200"),
            duration=self.duration.labels(endpoint, model, length),
            queue_duration=self.queue_duration.labels(endpoint),
            flops=self.flops.labels(plan, "executed"),
            flops_dense=self.flops.labels(plan, "dense_equivalent"),
            pairs=self.pairs.labels("scored"),
            pairs_dense=self.pairs.labels("dense_equivalent"),
            tokens=self.tokens.labels(tenant, model, plan),
            saved=self.saved.labels(tenant, model),
            planned=self.plans.labels(plan, "planned"),
        )

    def spent(
        self, model: str, plan: str, tenant: str, device_s: float, usd: float, joules: float | None = None
    ) -> None:
        """Of a request that ran, however it ended."""
        device_seconds, cost = self._spending(model, plan, tenant)
        device_seconds.inc(device_s)
        cost.inc(usd)
        if joules is not None:
            self.energy.labels(tenant, model, plan).inc(joules)  # no series where nothing measures

    def host_used(self, kind: str, tenant: str, seconds: float) -> None:
        """Host work of one kind has ended."""
        self._host_seconds(kind, tenant).inc(seconds)

    @lru_cache(1024)  # noqa: B019 (as above)
    def _host_seconds(self, kind: str, tenant: str) -> Counter:
        return self.host_seconds.labels(kind, tenant)

    def spent_on_host(self, model: str, tenant: str, usd: float) -> None:
        """Of a request that the device never got."""
        self.cost.labels(tenant, model, "none").inc(usd)

    @lru_cache(1024)  # noqa: B019 (as above)
    def _spending(self, model: str, plan: str, tenant: str) -> tuple[Counter, Counter]:
        return self.device_seconds.labels(model, plan, tenant), self.cost.labels(tenant, model, plan)

    def predicted(self, kind: PlanKind, predicted_s: float, used_s: float) -> None:
        """One run of the device: members of a batch share what is paid once, so only the whole can be compared."""
        if used_s > 0:
            self.prediction.labels(kind.value).observe(predicted_s / used_s)

    def failed(self, endpoint: str, model: str, kind: Kind, duration_s: float | None) -> None:
        self.requests.labels(endpoint, model, "none", str(CODES[kind].http)).inc()
        if duration_s is not None:
            self.duration.labels(endpoint, model, "unknown").observe(duration_s)
        if kind not in (Kind.INTERNAL, Kind.CANCELLED):
            self.rejections.labels(kind.value).inc()

    def refused(self, endpoint: str, kind: Kind) -> None:
        """A request that a transport refused before the engine saw it."""
        self.failed(endpoint, "unknown", kind, None)

    def batch(self, runs: Sequence[RunStats], queued_s: float) -> None:
        """One run of the device; members that were retried alone are batches of their own."""
        self.queue_predicted_seconds.set(queued_s)
        alone = [run for run in runs if run.batch_requests == 1]
        for run in alone or runs[:1]:
            self.batch_requests.observe(run.batch_requests)
            self.batch_tokens.observe(run.batch_tokens)
            self.slice.observe(run.slice_s)
            self.paused.inc(run.paused_s)
        if time.monotonic() >= self._memory_reported_s + 1:
            self.report_memory()

    def idle(self, seconds: float, joules: float | None = None) -> None:
        """The device had nothing to do for `seconds`, and used `joules` where that is measured."""
        self.idle_seconds.inc(seconds)
        if joules is not None:
            self.idle_energy.inc(joules)

    def allocated(self, usd: float) -> None:
        """What the device cost since the last report, used or not."""
        self.allocated_cost.inc(usd)

    def budget_used(self, tenant: str, budget: str, ratio: float) -> None:
        """`budget` is the name of a configured one."""
        self.budget_used_ratio.labels(tenant, budget).set(ratio)

    def budget_refused(self, tenant: str) -> None:
        self.refused_by_budget.labels(tenant).inc()

    def report_memory(self) -> None:
        self._memory_reported_s = time.monotonic()
        # ru_maxrss is in KiB on Linux
        self.peak_memory.set(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            self.resident_memory.set(int(statm.read().split()[1]) * resource.getpagesize())
