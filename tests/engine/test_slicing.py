"""Long work lets shorter work pass; failures on the device hurt nobody else, or everybody is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from service.attention import reference
from service.attention.masks import MaskSpec
from service.config import Config
from service.core.answer import Answer
from service.core.plan import PlanKind
from service.engine.engine import Engine
from service.engine.workloads.attention import AttentionWorkload
from service.engine.workloads.base import Outcome
from service.engine.workloads.forward import ForwardWorkload
from service.errors import FarsightError, Kind
from tests.engine.test_engine import attention, embed, run
from tests.engines import another, until_started


async def beside(engine: Engine, long: Any, *shorts: Any) -> tuple[list[str], list[Any]]:
    """(ids in the order of their answers, the answers in the order asked): shorts come while `long` runs."""
    order: list[str] = []

    async def one(request: Any) -> Any:
        try:
            return await engine.submit(request)
        finally:
            order.append(request.id)

    tasks = [asyncio.create_task(one(long))]
    await until_started(engine)
    tasks += [asyncio.create_task(one(short)) for short in shorts]
    return order, await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def eager(engine: Engine) -> Iterator[Engine]:
    """One that takes 10 ms for long."""
    config = engine.config.model_copy(update={"batch_budget_s": 0.01})
    other = another(engine, config, threads=2)
    yield other
    other.close()


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_short_work_runs_inside_long_work_and_both_are_right(eager: Engine, mode: str) -> None:
    engine = eager
    long = attention(8192, 1, heads=8, mode=mode, is_causal=True)
    alone: Answer = run(engine.submit(long))
    order, (answer, *shorts) = run(beside(engine, long, attention(16, 3), attention(64, 2), attention(16, 4)))
    assert order[-1] == "r1"
    assert torch.equal(answer.tensors["output"], alone.tensors["output"])
    short = shorts[1]
    exact = reference.attend(attention(64, 2).query, attention(64, 2).key, attention(64, 2).value, MaskSpec())
    assert torch.allclose(short.tensors["output"], exact.out, atol=1e-5)
    # what ran inside is not the long one's device time, and nobody is charged twice
    assert answer.timing.paused_s >= sum(one.usage.device_s for one in shorts) > 0
    assert answer.timing.device_s + answer.timing.paused_s <= answer.timing.total_s
    assert all(one.timing.paused_s == 0 for one in shorts)


def test_first_in_first_out_interrupts_nothing(engine: Engine) -> None:
    other = another(engine, order="arrival")
    try:
        order, answers = run(beside(other, attention(8192, 1, heads=8, mode="chunked"), attention(64, 2)))
    finally:
        other.close()
    assert order == ["r1", "r2"]
    assert answers[0].timing.paused_s == 0


def test_a_failure_inside_does_not_reach_the_long_run(eager: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = eager
    original = AttentionWorkload._attend

    def poisoned(self: AttentionWorkload, work: Any, request: Any, checkpoint: Any) -> Outcome:
        if work.prepared.request.id == "r13":
            raise ValueError("secret")
        return original(self, work, request, checkpoint)

    monkeypatch.setattr(AttentionWorkload, "_attend", poisoned)
    _, (answer, failed) = run(beside(engine, attention(8192, 1, heads=8, mode="chunked"), attention(64, 13)))
    assert isinstance(answer, Answer)
    assert failed.kind is Kind.INTERNAL


def test_of_32_with_a_poisoned_member_31_are_answered_as_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {index} " * (index % 5 + 1) for index in range(32)]
    alone = [run(engine.submit(embed(text))).tensors["embedding"] for text in texts]
    original = ForwardWorkload.run

    def poisoned(self: ForwardWorkload, works: Any, checkpoint: Any) -> list[Outcome]:
        if any(work.prepared.request.texts == (texts[17],) for work in works):
            raise ValueError("secret")
        return original(self, works, checkpoint)

    monkeypatch.setattr(ForwardWorkload, "run", poisoned)

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.submit(embed(text)) for text in texts), return_exceptions=True)

    answers = run(together())
    error = answers.pop(17)
    del alone[17]
    assert isinstance(error, FarsightError)
    assert (error.kind, error.message) == (Kind.INTERNAL, "internal error; request id e")
    assert all(
        torch.allclose(answer.tensors["embedding"], one, atol=1e-5) for answer, one in zip(answers, alone, strict=True)
    )


def test_attention_that_does_not_fit_runs_by_blocks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AttentionWorkload._attend

    def greedy(self: AttentionWorkload, work: Any, request: Any, checkpoint: Any) -> Outcome:
        if work.plan.kind is not PlanKind.CHUNKED:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, work, request, checkpoint)

    monkeypatch.setattr(AttentionWorkload, "_attend", greedy)
    answer: Answer = run(engine.submit(attention(600, mode="dense")))
    assert answer.plan.kind is PlanKind.CHUNKED
    assert "ran out of memory" in answer.plan.reason


def test_a_forward_pass_that_does_not_fit_runs_in_smaller_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tuple(f"text number {index} " * 20 for index in range(16))
    alone = run(engine.submit(embed(*texts))).tensors["embedding"]
    original, seen = ForwardWorkload.run, []

    def greedy(self: ForwardWorkload, works: Any, checkpoint: Any) -> list[Outcome]:
        seen.append(works[0].prepared.model.max_batch_tokens)
        if works[0].prepared.model.max_batch_tokens > 400:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(self, works, checkpoint)

    monkeypatch.setattr(ForwardWorkload, "run", greedy)
    answer: Answer = run(engine.submit(embed(*texts)))
    assert torch.allclose(answer.tensors["embedding"], alone, atol=1e-5)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 2


@pytest.fixture
def doomed(engine: Engine) -> Iterator[Engine]:
    other = another(engine, Config(), threads=2)
    yield other
    other.close()


def test_a_lost_device_answers_all_and_is_seen(doomed: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AttentionWorkload._attend

    def lost(self: AttentionWorkload, work: Any, request: Any, checkpoint: Any) -> Outcome:
        if work.prepared.request.id == "r2":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, work, request, checkpoint)

    monkeypatch.setattr(AttentionWorkload, "_attend", lost)
    shorts = [attention(64, seed) for seed in (2, 3, 4)]
    _, answers = run(beside(doomed, attention(8192, 1, heads=8, mode="chunked"), *shorts))
    assert [one.kind for one in answers] == [Kind.UNAVAILABLE] * 4
    assert all(one.retry_after_s is not None for one in answers)
    assert not doomed.alive
    with pytest.raises(FarsightError) as caught:
        run(doomed.submit(attention()))
    assert caught.value.kind is Kind.UNAVAILABLE


def test_a_bug_of_the_scheduler_hangs_nobody(doomed: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(doomed.execution.device._loop._scheduler, "finished", broken)
    with pytest.raises(FarsightError) as caught:
        run(doomed.submit(attention()))
    assert caught.value.kind is Kind.UNAVAILABLE
    assert not doomed.alive


def test_nothing_is_left_of_clients_that_leave_at_any_moment(engine: Engine) -> None:
    async def leave() -> None:
        tasks = []
        for index in range(300):
            request = attention(512 if index % 10 else 4096, index % 7, heads=2, mode="chunked")
            tasks.append(asyncio.create_task(engine.submit(request)))
            await asyncio.sleep(0.0005 * (index % 4))
            if index % 3:
                tasks[-(index % 3)].cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.submit(attention(16, 4, timeout_s=60))  # the device is free again

    run(leave())
    device = engine.execution.device
    assert (device.waiting, engine.execution.waiting, device.is_running) == (0, 0, False)
    assert engine.ahead_s() == 0
    flows = [engine.execution.device._loop._scheduler._root]
    while flows:
        flow = flows.pop()
        assert flow.active == 0
        flows += flow.children.values()
