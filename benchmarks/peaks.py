"""Predicted against actual peak memory: one request in a fresh process, and how far its resident memory grew.

Resident memory, not torch's profiler: what the kernels' libraries and the allocator take is the machine's memory too.
The kernel keeps the peak (VmHWM), so nothing between two looks is missed. Processes are forked before torch's threads
start, and compute something small of the same kind first, so that code and thread stacks are there.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.learning import MODEL
from service.attention.synthetic import structured
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
    Request,
)
from service.engine.runner import (
    BatchRunner,
    Job,
    Outcome,
    batch_key,
    forward_key,
)
from service.models.inputs.rows import Tokenized
from service.models.loading.load import LoadSettings, load
from service.models.model import Model
from service.planning import forward_plan, planner
from service.planning.attention_cost import CostFeatures
from service.planning.calibration import DTYPES
from service.planning.device_profile import DeviceProfile

LEAST_BYTES = 32 * 2**20  # predicted; the peaks of smaller requests are the process's own noise
CPU = torch.device("cpu")
EVEN = (0.0,) * len(CostFeatures._fields)  # seconds play no part here
PROFILE = DeviceProfile(
    "cpu", {(kind, dtype): EVEN for kind in PlanKind for dtype in DTYPES}, dict.fromkeys(DTYPES, 1e11), 1 << 50
)


@dataclass(frozen=True, slots=True)
class Case:
    """Attention of a shape under a plan, or texts of so many tokens through the demo model."""

    kind: PlanKind
    shape: AttentionShape | None = None
    options: AttentionOptions = field(default_factory=AttentionOptions)
    lengths: tuple[int, ...] = ()
    task: str = "embed"

    @property
    def name(self) -> str:
        if self.shape is None:
            return f"{self.task} of {len(self.lengths)} x {max(self.lengths)} tokens"
        one = self.shape
        heads, causal = f"{one.heads}/{one.kv_heads}", ", causal" if self.options.is_causal else ""
        lengths = f"{one.query_length:,} x {one.key_length:,}"
        return f"{self.kind} {one.batch} x {heads} heads of {one.head_dim}, {lengths}, {one.dtype}{causal}"


@dataclass(frozen=True, slots=True)
class Row:
    """One request; bytes, inputs and output included."""

    name: str
    kind: str
    predicted_bytes: int
    actual_bytes: int

    @property
    def ratio(self) -> float:
        return self.predicted_bytes / self.actual_bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """Share of the predictions within 20 % of actual and not under it by more than 10 %; the worst on either side."""

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
    """Medians of a few processes. Raises RuntimeError where the kernel does not keep a peak that can be reset."""
    context = multiprocessing.get_context("fork")
    rows = []
    for case in cases():
        found = []
        for _ in range(rounds):
            with context.Pool(1) as pool:
                found.append(pool.apply(measured, (case,)))
        if found[0].predicted_bytes >= LEAST_BYTES:
            rows.append(replace(found[0], actual_bytes=int(median(one.actual_bytes for one in found))))
    return figures(rows)


def figures(rows: list[Row]) -> Figures:
    ratios = [row.ratio for row in rows]
    return Figures(mean(0.9 <= one <= 1.2 for one in ratios), min(ratios), max(ratios), LEAST_BYTES, rows)


def measured(case: Case) -> Row:
    """In a process of its own."""
    torch.set_num_threads(multiprocessing.cpu_count())
    model = load(MODEL, LoadSettings(CPU, 1 << 20, Config().max_batch_tokens)) if case.shape is None else None
    runner = BatchRunner(Config(), CPU)
    small = _job(_smaller(case), model)
    assert isinstance(runner.run([small])[0].outcome, Outcome)
    job = _job(case, model)
    held = 0
    if isinstance(job.request, AttentionRequest):
        held = sum(one.nbytes for one in (job.request.query, job.request.key, job.request.value))
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs has left would be used again, and not be seen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"the peak of resident memory cannot be reset: {error}") from error
    before = _status("VmRSS")
    result = runner.run([job])[0]
    if not isinstance(result.outcome, Outcome):
        raise result.outcome
    grown = _status("VmHWM") - before
    return Row(case.name, job.plan.kind.value, job.plan.cost.peak_bytes, held + grown)


def _smaller(case: Case) -> Case:
    if case.shape is None:
        return Case(case.kind, lengths=(8, 8), task=case.task)
    one = case.shape
    shape = AttentionShape(1, one.kv_heads, one.kv_heads, 256, 256, one.head_dim, one.value_dim, one.dtype)
    return Case(case.kind, shape, AttentionOptions(mode=case.kind.value))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _job(case: Case, model: Model | None) -> Job:
    future: Any = asyncio.new_event_loop().create_future()
    config = Config()
    request: Request
    if case.shape is not None:
        one = case.shape
        dtype = getattr(torch, one.dtype)
        query, key, value = structured(one.batch, one.heads, one.kv_heads, one.key_length, one.head_dim, dtype)
        query = query[:, :, one.key_length - one.query_length :].contiguous()
        request = AttentionRequest("r", query, key, value, case.options)
        plan = planner.plan_attention(one, case.options, PROFILE, config)
        return Job(request, plan, batch_key(request, plan), 0.0, 0.0, float("inf"), future)
    assert model is not None, "bug: a forward pass without its model"
    options: ForwardOptions = HiddenOptions() if case.task == "hidden" else EmbedOptions()
    ids = tuple(tuple(1000 + at for at in range(length)) for length in case.lengths)
    request = ForwardRequest("r", MODEL.name, case.task, options, token_ids=ids)  # type: ignore[arg-type]
    tokenized: Tokenized = model.tokenize(request)
    sizes = [(len(row), 0) for row in tokenized.rows]
    plan = forward_plan.plan_forward(model.info, sizes, request, PROFILE, config)
    key_ = forward_key(request, plan, model)
    return Job(request, plan, key_, 0.0, 0.0, float("inf"), future, PlanKind.DENSE, model, tokenized)
