"""Predicted and actual peak memory: each request runs in a fresh process, whose growth of resident memory is measured.

Resident memory, not torch's profiler: memory of the kernels' libraries and of the allocator counts too. The operating
system records the peak (VmHWM), so nothing between two readings is missed. Processes are forked before torch starts
threads, and first compute something small of the same kind, so that code and thread stacks are already resident.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from service.attention.output import no_checkpoint
from service.attention.synthetic import InputShape, structured
from service.billing.tenants import Tenants
from service.config import Config
from service.core.options import (
    AttentionOptions,
    EmbedOptions,
    ForwardOptions,
    HiddenOptions,
)
from service.core.plan import PlanKind
from service.core.request import (
    AttentionRequest,
    AttentionShape,
    ForwardRequest,
)
from service.engine.host_work import HostWork
from service.engine.workloads.attention import AttentionWorkload, PreparedAttention
from service.engine.workloads.base import PlannedWork, Workload
from service.engine.workloads.forward import ForwardWorkload, PreparedForward
from service.models.demo import DEMO_MODEL
from service.models.loading.load import LoadSettings, load
from service.models.model import Model
from service.models.registry import Registry
from service.planning import attention_plan, forward_plan
from service.planning.attention_cost import CostFeatures
from service.planning.calibration import DTYPES
from service.planning.device_profile import DeviceProfile
from service.telemetry.metrics import Metrics

LEAST_BYTES = 32 * 2**20  # predicted; peaks of smaller requests are lost in the noise of the process
CPU = torch.device("cpu")
EVEN = (0.0,) * len(CostFeatures._fields)  # seconds are not used here
PROFILE = DeviceProfile(
    "cpu", {(kind, dtype): EVEN for kind in PlanKind for dtype in DTYPES}, dict.fromkeys(DTYPES, 1e11), 1 << 50
)


@dataclass(frozen=True, slots=True)
class Case:
    """Attention of a shape under a plan, or texts of these lengths in tokens through the demo model."""

    kind: PlanKind
    shape: AttentionShape | None = None
    options: AttentionOptions = field(default_factory=AttentionOptions)
    lengths: tuple[int, ...] = ()
    task: str = "embed"

    @property
    def name(self) -> str:
        if self.shape is None:
            return f"{self.task} of {len(self.lengths)} x {max(self.lengths)} tokens"
        shape = self.shape
        heads, causal = f"{shape.heads}/{shape.kv_heads}", ", causal" if self.options.is_causal else ""
        lengths = f"{shape.query_length:,} x {shape.key_length:,}"
        return f"{self.kind} {shape.batch} x {heads} heads of {shape.head_dim}, {lengths}, {shape.dtype}{causal}"


@dataclass(frozen=True, slots=True)
class Row:
    """One request; bytes include inputs and output."""

    name: str
    kind: str
    predicted_bytes: int
    actual_bytes: int

    @property
    def ratio(self) -> float:
        return self.predicted_bytes / self.actual_bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """Share of the predictions at most 20 % over and 10 % under the actual peak; the extreme ratios on both sides."""

    within: float
    lowest: float
    highest: float
    least_bytes: int
    rows: list[Row]


def cases() -> Iterator[Case]:
    shapes = [
        (1, 8, 8, 4096, 4096, 64, "float32", True),
        (1, 8, 2, 8192, 8192, 64, "bfloat16", True),
        (4, 12, 12, 2048, 2048, 64, "float32", False),
        (1, 4, 4, 4096, 4096, 128, "float16", True),
        (1, 2, 2, 16384, 16384, 64, "float32", True),
        (16, 8, 8, 1024, 1024, 64, "float32", True),
        (1, 8, 8, 512, 32768, 64, "float32", False),
        (2, 16, 4, 3000, 6000, 96, "bfloat16", True),
        (1, 16, 4, 2048, 2048, 128, "float32", True),
    ]
    for batch, heads, kv_heads, queries, keys, width, dtype, is_causal in shapes:
        shape = AttentionShape(batch, heads, kv_heads, queries, keys, width, width, dtype)
        for kind in PlanKind:
            yield Case(kind, shape, AttentionOptions(is_causal=is_causal, mode=kind.value))
    window = AttentionShape(1, 8, 8, 8192, 8192, 64, 64)
    yield Case(PlanKind.DENSE, window, AttentionOptions(mode="dense", is_causal=True, window=(1024, 0)))
    rows = AttentionOptions(mode="dense", returns=("output", "weights"), rows=tuple(range(256)))
    yield Case(PlanKind.DENSE, window, rows)
    for lengths in ((256,) * 16, (256,) * 64, (40,) * 400, (256,) * 100):
        yield Case(PlanKind.DENSE, lengths=lengths)
    yield Case(PlanKind.DENSE, lengths=(256,) * 64, task="hidden")


def run(rounds: int = 3) -> Figures:
    """Medians over `rounds` processes per case. Raises RuntimeError if the operating system cannot reset the peak."""
    context = multiprocessing.get_context("fork")
    rows = []
    for case in cases():
        found = []
        for _ in range(rounds):
            with context.Pool(1) as pool:
                found.append(pool.apply(measured, (case,)))
        if found[0].predicted_bytes >= LEAST_BYTES:
            rows.append(replace(found[0], actual_bytes=int(median(row.actual_bytes for row in found))))
    return figures(rows)


def figures(rows: list[Row]) -> Figures:
    ratios = [row.ratio for row in rows]
    return Figures(mean(0.9 <= ratio <= 1.2 for ratio in ratios), min(ratios), max(ratios), LEAST_BYTES, rows)


def measured(case: Case) -> Row:
    """Measure a case; must run in its own process."""
    torch.set_num_threads(multiprocessing.cpu_count())
    model = load(DEMO_MODEL, LoadSettings(CPU, 1 << 20, Config().max_batch_tokens)) if case.shape is None else None
    small = _planned(_smaller(case), model)
    small.run()
    planned = _planned(case, model)
    held = 0
    if case.shape is not None:
        request = planned.work.prepared.request
        held = sum(tensor.nbytes for tensor in (request.query, request.key, request.value))
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs has left would be reused and not counted
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"the peak of resident memory cannot be reset: {error}") from error
    before = _status("VmRSS")
    planned.run()
    grown = _status("VmHWM") - before
    plan = planned.work.plan
    return Row(case.name, plan.kind.value, plan.cost.peak_bytes, held + grown)


def _smaller(case: Case) -> Case:
    if case.shape is None:
        return Case(case.kind, lengths=(8, 8), task=case.task)
    kv_heads, shape = case.shape.kv_heads, case.shape
    shape = AttentionShape(1, kv_heads, kv_heads, 256, 256, shape.head_dim, shape.value_dim, shape.dtype)
    return Case(case.kind, shape, AttentionOptions(mode=case.kind.value))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True, slots=True)
class _Planned:
    """A request with its plan and the workload that runs it."""

    workload: Workload[Any, Any]
    work: PlannedWork[Any]

    def run(self) -> None:
        self.workload.run([self.work], no_checkpoint)


def _planned(case: Case, model: Model | None) -> _Planned:
    config = Config()
    if case.shape is not None:
        shape = case.shape
        dtype = getattr(torch, shape.dtype)
        inputs = structured(
            InputShape(shape.batch, shape.heads, shape.kv_heads, shape.key_length, shape.head_dim), dtype
        )
        query = inputs[0][:, :, shape.key_length - shape.query_length :].contiguous()
        request = AttentionRequest("r", query, inputs[1], inputs[2], case.options)
        plan = attention_plan.plan_attention(shape, case.options, PROFILE, config)
        attention = PreparedAttention(request, shape)
        return _Planned(AttentionWorkload(config, PROFILE, CPU), PlannedWork(attention, plan, PlanKind.DENSE))
    assert model is not None, "bug: a forward pass without its model"
    options: ForwardOptions = HiddenOptions() if case.task == "hidden" else EmbedOptions()
    ids = tuple(tuple(1000 + at for at in range(length)) for length in case.lengths)
    texts = ForwardRequest("r", DEMO_MODEL.name, case.task, options, token_ids=ids)  # type: ignore[arg-type]
    tokenized = model.tokenize(texts)
    sizes = tuple((len(row), 0) for row in tokenized.rows)
    plan = forward_plan.plan_forward(model.info, sizes, texts, PROFILE, config)
    registry = Registry(LoadSettings(CPU, 1, 1))
    host = HostWork(config, Tenants(config), Metrics(CollectorRegistry()), None, time.perf_counter)
    workload = ForwardWorkload(config, PROFILE, registry, host, time.perf_counter)
    return _Planned(
        workload, PlannedWork(PreparedForward(texts, model, model.info, tokenized, sizes, 0.0), plan, PlanKind.DENSE)
    )
