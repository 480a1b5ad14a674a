"""The whole way of a request without a transport: real device thread, real model, real batches."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from service.attention import reference
from service.attention.masks import MaskSpec
from service.attention.sparse import audit, segment_plan
from service.attention.synthetic import InputShape, diffuse, structured
from service.config import Config
from service.core.answer import Answer
from service.core.options import (
    AttentionOptions,
    EmbedOptions,
    Priority,
    ScoreOptions,
)
from service.core.plan import PlanKind
from service.core.request import AttentionRequest, AttentionShape, ForwardRequest
from service.engine.engine import Engine
from service.engine.workloads.attention import AttentionWorkload
from service.engine.workloads.base import Outcome
from service.errors import FarsightError, Kind
from service.planning import attention_plan
from service.planning.attention_cost import map_bytes, selection_flops
from tests.engines import another, record_of


def attention(length: int = 16, seed: int = 0, *, heads: int = 2, **options: object) -> AttentionRequest:
    query, key, value = structured(InputShape(1, heads, heads, length, 16), seed=seed)
    return AttentionRequest(f"r{seed}", query, key, value, AttentionOptions.model_validate(options))


def embed(*texts: str, **options: Any) -> ForwardRequest:
    return ForwardRequest("e", "all-MiniLM-L6-v2", "embed", EmbedOptions(**options), texts)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def refusal(engine: Engine, request: AttentionRequest | ForwardRequest) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        run(engine.submit(request))
    return caught.value


def total(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"farsight_{name}", labels) or 0.0


@pytest.mark.parametrize("mode", ["auto", "dense", "chunked", "sparse"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_mode_answers_what_is_right(engine: Engine, mode: str, causal: bool) -> None:
    request = attention(600, mode=mode, is_causal=causal, returns=("output", "lse"))
    answer: Answer = run(engine.submit(request))
    exact = reference.attend(
        request.query.double(), request.key.double(), request.value.double(), MaskSpec(is_causal=causal)
    )
    error = ((answer.tensors["output"] - exact.out).norm() / exact.out.norm()).item()
    assert error <= max(1e-5, answer.error.relative_l2_upper)
    assert answer.tensors["lse"].shape == (1, 2, 600)
    if mode != "auto":
        assert answer.plan.kind == mode
    if mode == "sparse":
        assert answer.error.kind == "measured"
        assert answer.error.rows > 0
        assert answer.density is not None
    else:
        assert answer.error.kind == "exact"


def test_usage_adds_up(engine: Engine) -> None:
    answer: Answer = run(engine.submit(attention(128, mode="dense", is_causal=True)))
    usage, price = answer.usage, engine.config.price_per_device_hour_usd
    assert usage.pairs_scored == usage.pairs_dense == 2 * 128 * 129 // 2
    assert usage.flops == usage.flops_dense == 4 * 16 * usage.pairs_dense
    assert usage.cost_usd == usage.device_s * price / 3600
    assert usage.tokens == 128
    assert 0 < usage.device_s <= answer.timing.total_s
    assert answer.timing.queue_s + answer.timing.device_s <= answer.timing.total_s + 1e-3


def test_an_error_over_the_bound_is_replaced_by_the_exact_answer(engine: Engine) -> None:
    request = attention(2048, mode="sparse", is_causal=True, max_error=1e-9)
    answer: Answer = run(engine.submit(request))
    assert answer.plan.kind in (PlanKind.DENSE, PlanKind.CHUNKED)
    assert answer.error.kind == "exact"
    assert answer.error.fallback
    assert answer.error.rejected_relative_l2_upper is not None
    assert "recomputed exactly" in answer.plan.reason
    assert answer.usage.pairs_scored > answer.usage.pairs_dense


def test_diffuse_inputs_go_exact_by_themselves(engine: Engine) -> None:
    query, key, value = diffuse(InputShape(1, 1, 1, 4096, 64))
    request = AttentionRequest("d", query, key, value, AttentionOptions(is_causal=True))
    seconds = {key: (0.0 if key[0] is PlanKind.SPARSE else 1.0,) * 5 for key in engine.profile.attention_s_per}
    profile = replace(engine.profile, attention_s_per=seconds)
    other = another(engine, Config(sparse_min_tokens=4096), threads=1, profile=profile)
    answer: Answer = run(other.submit(request))
    assert answer.plan.kind in (PlanKind.DENSE, PlanKind.CHUNKED)
    assert "predicted density" in answer.plan.reason
    assert not answer.error.fallback


def test_concurrent_requests_share_batches_and_answers_do_not_mix(engine: Engine) -> None:
    async def together() -> list[Answer]:
        return list(await asyncio.gather(*(engine.submit(attention(32, seed)) for seed in range(40))))

    answers: list[Answer] = run(together())
    for seed, answer in enumerate(answers):
        alone: Answer = run(engine.submit(attention(32, seed)))
        assert answer.id == f"r{seed}"
        assert torch.allclose(answer.tensors["output"], alone.tensors["output"], atol=1e-6)
    assert max(answer.batch_requests for answer in answers) > 1


def test_stacked_requests_of_different_lengths_of_keys(engine: Engine) -> None:
    lengths = [(5,), None, (32,), (1,)]

    async def together() -> list[Answer]:
        requests = (attention(32, seed, kv_lengths=valid) for seed, valid in enumerate(lengths))
        return list(await asyncio.gather(*(engine.submit(request) for request in requests)))

    for seed, (valid, answer) in enumerate(zip(lengths, run(together()), strict=True)):
        request = attention(32, seed)
        mask = MaskSpec(kv_lengths=torch.tensor(valid or (32,)))
        exact = reference.attend(request.query, request.key, request.value, mask)
        assert torch.allclose(answer.tensors["output"], exact.out, atol=1e-5)


def test_a_batch_member_without_work_is_answered_like_the_others(engine: Engine) -> None:
    async def together() -> list[Answer]:
        lengths = [(0,), None, (0,), None]
        requests = (attention(32, seed, kv_lengths=valid) for seed, valid in enumerate(lengths))
        return list(await asyncio.gather(*(engine.submit(request) for request in requests)))

    answers: list[Answer] = run(together())
    assert answers[0].tensors["output"].eq(0).all()
    assert answers[0].usage.pairs_scored == 0
    assert answers[1].usage.pairs_scored == 2 * 32 * 32


def test_embeddings_are_packed_together_and_equal_single_ones(engine: Engine) -> None:
    texts = [f"text number {index} " * (index % 7 + 1) for index in range(24)]

    async def together() -> list[Answer]:
        return list(await asyncio.gather(*(engine.submit(embed(text)) for text in texts)))

    answers: list[Answer] = run(together())
    alone: Answer = run(engine.submit(embed(*texts)))
    assert torch.allclose(
        torch.cat([answer.tensors["embedding"] for answer in answers]), alone.tensors["embedding"], atol=1e-5
    )
    assert max(answer.batch_requests for answer in answers) > 1
    assert sum(answer.usage.tokens for answer in answers) == alone.usage.tokens


def test_a_guilty_batch_mate_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AttentionWorkload._attend

    def poisoned(self: AttentionWorkload, work: Any, request: Any, checkpoint: Any) -> Outcome:
        if request.query.eq(12345.0).any():
            raise ValueError("secret internals")
        return original(self, work, request, checkpoint)

    monkeypatch.setattr(AttentionWorkload, "_attend", poisoned)
    bad = attention(16, 99)
    bad.query[0, 0, 0, 0] = 12345.0

    async def together() -> list[Any]:
        requests = [attention(16, seed) for seed in range(8)]
        requests.insert(4, bad)
        return await asyncio.gather(*(engine.submit(request) for request in requests), return_exceptions=True)

    results = run(together())
    error = results.pop(4)
    assert isinstance(error, FarsightError)
    assert error.kind is Kind.INTERNAL
    assert "secret" not in error.message
    assert "r99" in error.message
    assert all(isinstance(result, Answer) for result in results)


def test_out_of_memory_is_survived(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object) -> Outcome:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AttentionWorkload, "_attend", greedy)
        error = refusal(engine, attention())
    assert error.kind is Kind.OUT_OF_MEMORY
    assert "bytes" in error.message
    assert run(engine.submit(attention())).error.kind == "exact"


def test_a_caller_that_leaves_cancels_queued_work(engine: Engine) -> None:
    async def leave() -> tuple[int, Answer]:
        first = asyncio.create_task(engine.submit(attention(4096, 1, heads=8, mode="chunked")))
        await asyncio.sleep(0.05)  # on the device now
        # as long as the first, so that it does not pass it
        queued = asyncio.create_task(engine.submit(attention(4096, 2, heads=8, mode="chunked")))
        await asyncio.sleep(0.01)
        waiting = engine.execution.device.waiting
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        assert engine.execution.device.waiting == 0
        return waiting, await first

    waiting, answer = run(leave())
    assert waiting == 1
    assert answer.error.kind == "exact"


def test_running_work_stops_at_its_deadline_and_frees_the_device(engine: Engine) -> None:
    async def late() -> tuple[FarsightError, float]:
        loop = asyncio.get_running_loop()
        profile_hidden = attention(8192, 3, heads=8, mode="chunked", timeout_s=0.3)
        engine_admits = engine.admission.admit
        engine.admission.admit = lambda *_, **__: None  # type: ignore[method-assign]  # it would be refused as late at once
        try:
            with pytest.raises(FarsightError) as caught:
                await engine.submit(profile_hidden)
        finally:
            engine.admission.admit = engine_admits  # type: ignore[method-assign]
        start = loop.time()
        await engine.submit(attention(16, 4, timeout_s=60))
        return caught.value, loop.time() - start

    error, freed_after_s = run(late())
    assert error.kind is Kind.DEADLINE
    assert "running" in error.message
    assert freed_after_s < 1.0


def test_what_would_be_late_is_refused_before_it_starts(engine: Engine) -> None:
    error = refusal(engine, attention(8192, heads=8, timeout_s=0.01))
    assert (error.kind, error.code) == (Kind.DEADLINE, "predicted_late")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"model": "nope"}, Kind.NOT_FOUND, "known: all-MiniLM-L6-v2"),
        ({"texts": ("word " * 300,)}, Kind.TOO_LARGE, "302 tokens, over the 256"),
        ({"texts": ("a",) * 2049}, Kind.TOO_LARGE, "2049 items"),
        ({"options": EmbedOptions(dimensions=385)}, Kind.INVALID, "expected 1..384"),
        ({"task": "score", "options": ScoreOptions()}, Kind.INVALID, "is for embed, not for score; it takes embed"),
        ({"texts": (), "images": (b"x",)}, Kind.INVALID, "takes text, not images"),
        ({"texts": (), "token_ids": ((99999,),)}, Kind.INVALID, "token id 99999"),
    ],
)
def test_forward_refusals(engine: Engine, fields: dict[str, Any], kind: Kind, message: str) -> None:
    error = refusal(engine, replace(embed("a"), **fields))
    assert error.kind is kind
    assert message in error.message


def test_weights_are_returned_by_row_and_refused_whole(engine: Engine) -> None:
    rows = attention(64, returns=("weights", "top_weights"), rows=(0, 63), top_k=3)
    answer: Answer = run(engine.submit(rows))
    assert answer.tensors["weights"].shape == (1, 2, 2, 64)
    assert torch.allclose(answer.tensors["weights"].sum(-1), torch.ones(1, 2, 2), atol=1e-5)
    best, where = answer.tensors["weights"].topk(3)
    assert torch.allclose(answer.tensors["top_weights"], best)
    assert torch.equal(answer.tensors["top_indices"], where)
    error = refusal(engine, attention(4096, heads=2, returns=("weights",)))
    assert (error.kind, error.code) == (Kind.TOO_LARGE, "weights_too_large")
    assert str(4 * 2 * 4096 * 4096) in error.message


def test_a_block_map_is_limited_like_weights(engine: Engine) -> None:
    answer: Answer = run(engine.submit(attention(64, returns=("block_map", "lse"))))
    assert answer.tensors["block_map"].tolist() == [[[[255]], [[255]]]]
    assert set(answer.tensors) == {"block_map", "lse"}
    tensor = torch.zeros(1, 1, 1, 1).expand(2, 600, 32768, 1)
    shape = AttentionShape(2, 600, 600, 32768, 32768, 1, 1, "float32")
    assert map_bytes(shape, AttentionOptions(returns=("block_map",))) == 2 * 600 * 256 * 256
    big = replace(attention(64, returns=("block_map",)), query=tensor, key=tensor, value=tensor)
    error = refusal(engine, big)
    assert (error.kind, error.code) == (Kind.TOO_LARGE, "weights_too_large")
    assert "block_map of 1200 heads takes 78643200 bytes" in error.message


def test_metrics_hold_what_the_answers_said(engine: Engine, registry: CollectorRegistry) -> None:
    labels = {"endpoint": "attention", "model": "attention", "plan": "dense", "code": "200"}
    seconds = {"model": "attention", "plan": "dense", "tenant": "default"}
    before = total(registry, "requests_total", **labels), total(registry, "device_seconds_total", **seconds)
    flops = total(registry, "flops_total", plan="dense", kind="executed")
    answers: list[Answer] = [run(engine.submit(attention(64, seed, mode="dense"))) for seed in range(5)]
    assert total(registry, "requests_total", **labels) - before[0] == 5
    spent = total(registry, "device_seconds_total", **seconds) - before[1]
    assert spent == pytest.approx(sum(answer.usage.device_s for answer in answers))
    assert total(registry, "flops_total", plan="dense", kind="executed") - flops == sum(a.usage.flops for a in answers)


def test_refusals_are_counted_once(engine: Engine, registry: CollectorRegistry) -> None:
    before = total(registry, "rejections_total", reason="not_found")
    refusal(engine, replace(embed("a"), model="no-such-model"))
    assert total(registry, "rejections_total", reason="not_found") - before == 1
    # a name that does not exist makes no series of its own
    assert total(registry, "requests_total", endpoint="embeddings", model="no-such-model", plan="none", code="404") == 0


def test_estimates_price_all_plans_and_run_nothing(engine: Engine, registry: CollectorRegistry) -> None:
    before = total(registry, "batch_requests_count")
    request = attention(512, is_causal=True)
    estimate = engine.estimate(request.shape, request.options)
    assert set(estimate.candidates) == set(PlanKind)
    # which of them is faster, this machine decides
    exact = [estimate.candidates[kind] for kind in (PlanKind.DENSE, PlanKind.CHUNKED)]
    assert estimate.chosen is min(exact, key=lambda candidate: candidate.predicted_s).kind
    assert estimate.would_admit
    forward = run(engine.priced(embed("what does this cost?")))
    assert set(forward.candidates) == set(PlanKind)
    assert forward.chosen is PlanKind.DENSE
    assert forward.would_admit
    assert "under sparse_min_tokens" in forward.candidates[PlanKind.SPARSE].reason
    answer: Answer = run(engine.submit(embed("what does this cost?")))
    assert forward.candidates[PlanKind.DENSE].cost.flops == answer.usage.flops
    assert total(registry, "batch_requests_count") - before == 1


def test_an_estimate_of_a_pass_that_cannot_fit_says_so(engine: Engine) -> None:
    text = embed("what does this cost?")
    small = engine.config.model_copy(update={"max_peak_bytes": 1000})
    other = another(engine, small, threads=1)
    try:
        estimate = run(other.priced(text))
        error = refusal(other, text)
    finally:
        other.close()
    assert not estimate.would_admit
    assert estimate.chosen is None
    assert error.kind is Kind.TOO_LARGE
    assert estimate.reason == error.message
    assert "over the limit of 1000 bytes" in estimate.reason


def test_an_estimate_is_what_the_plan_then_says(engine: Engine) -> None:
    """With what was learned, wherever seconds are told; the queue counts the same ones."""
    request = attention(300, heads=3, mode="chunked")

    async def both() -> tuple[float, float, float]:
        told_s = engine.estimate(request.shape, request.options).candidates[PlanKind.CHUNKED].predicted_s
        plan = (await engine.pricing.plan(request, 0.0, 1e9, record_of(request))).work.plan
        return told_s, plan.predicted_s, plan.predicted_s / plan.correction

    for _ in range(20):
        run(engine.submit(request))
    told_s, planned_s, bare_s = run(both())
    assert told_s == planned_s
    bare = attention_plan.attention_candidates(request.shape, request.options, engine.profile, engine.config)[
        PlanKind.CHUNKED
    ]
    assert bare_s == pytest.approx(bare.predicted_s)
    assert planned_s != bare.predicted_s


def test_each_run_of_the_device_is_compared_with_its_prediction_once(
    engine: Engine, registry: CollectorRegistry
) -> None:
    before = total(registry, "prediction_ratio_count", plan="dense")

    async def together() -> list[Answer]:
        return list(await asyncio.gather(*(engine.submit(attention(24, seed)) for seed in range(12))))

    answers: list[Answer] = run(together())
    batches = sum(1 / answer.batch_requests for answer in answers)
    assert max(answer.batch_requests for answer in answers) > 1
    assert total(registry, "prediction_ratio_count", plan="dense") - before == pytest.approx(batches)


@pytest.mark.parametrize("causal", [True, False])
def test_usage_of_a_sparse_answer_is_what_was_counted(
    engine: Engine, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept blocks, outliers and centroids one by one, and the rows of the audit."""
    request = attention(1500, 5, mode="sparse", is_causal=causal, max_error=1.0)
    counted: list[int] = []
    found_blocks, found_rows = segment_plan.select, audit.attend_rows

    def select(*arguments: Any, **more: Any) -> Any:
        found = found_blocks(*arguments, **more)
        layout, visible = found.layout, torch.ones(1500, 1500, dtype=torch.bool)
        visible = visible.tril() if causal else visible
        whole = layout.whole()
        for head in range(2):
            keep = found.keep[0, head].repeat_interleave(128, 0).repeat_interleave(128, 1)[:1500, :1500]
            counted.append(int((visible & keep).sum()))
            rest = whole & ~found.keep[0, head]
            rows = torch.tensor([min(128, 1500 - 128 * block) for block in range(layout.q_blocks)])
            for position in found.moments[0][head].outliers.tolist():
                counted.append(int((rest[:, position // 128] * rows).sum()))
            for part in found.summarized[0][head]:
                for column in part.columns.tolist():
                    counted.append(int((rest[part.blocks, column] * rows[part.blocks]).sum()))
        return found

    def attend_rows(*arguments: Any, **more: Any) -> Any:
        rows = arguments[1].index
        counted.append(int((rows + 1).sum()) if causal else 1500 * rows.numel())
        return found_rows(*arguments, **more)

    monkeypatch.setattr(segment_plan, "select", select)
    monkeypatch.setattr(audit, "attend_rows", attend_rows)
    answer: Answer = run(engine.submit(request))
    assert answer.plan.kind is PlanKind.SPARSE
    assert not answer.error.fallback
    assert answer.usage.pairs_scored == sum(counted)
    looked = selection_flops(request.shape, answer.usage.pairs_dense, engine.config.block_size)
    assert answer.usage.flops == 4 * 16 * sum(counted) + looked


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_values_whose_sum_overflows(engine: Engine, mode: str, dtype: torch.dtype) -> None:
    request = attention(512, 5, mode=mode)
    value = torch.full_like(request.value, 3e38).to(dtype)
    request = replace(request, query=request.query.to(dtype), key=request.key.to(dtype), value=value)
    answer: Answer = run(engine.submit(request))
    assert ((answer.tensors["output"].double() / value.double()) - 1).abs().max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["dense", "chunked", "auto"])
def test_scores_beyond_float32_are_refused_never_zeros(engine: Engine, mode: str) -> None:
    """Torch's fused kernel answers zeros for rows of NaN."""
    request = attention(8, 5, mode=mode)
    request = replace(request, query=request.query * 1e20, key=request.key * 1e20)
    with pytest.raises(FarsightError, match="not finite"):
        run(engine.submit(request))


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_a_softcap_beyond_float32_caps_nothing(engine: Engine, mode: str) -> None:
    capped: Answer = run(engine.submit(attention(512, 5, mode=mode, softcap=1e39)))
    free: Answer = run(engine.submit(attention(512, 5, mode=mode)))
    assert torch.equal(capped.tensors["output"], free.tensors["output"])


def test_batch_priority_is_carried(engine: Engine) -> None:
    answer: Answer = run(engine.submit(attention(16, priority="batch")))
    assert answer.error.kind == "exact"
    assert run(engine.submit(embed("a", priority=Priority.BATCH))).usage.tokens == 3


@pytest.fixture
def closed(engine: Engine) -> Engine:
    other = another(engine, engine.config, threads=1)
    other.close()
    return other


def test_a_dead_device_thread_is_unavailable_not_a_hang(closed: Engine) -> None:
    assert not closed.ready
    error = refusal(closed, attention())
    assert error.kind is Kind.UNAVAILABLE
    assert error.retry_after_s is not None


def test_made_up_models_and_tenants_are_one_series(engine: Engine, registry: CollectorRegistry) -> None:
    def series() -> set[tuple[str, ...]]:
        return {(one.name, *one.labels.values()) for metric in registry.collect() for one in metric.samples}

    async def ask(numbers: range) -> None:
        for number in numbers:
            made_up = replace(embed("a text"), id=f"id {number}", model=f"model {number}", tenant=f"tenant {number}")
            with pytest.raises(FarsightError, match="not served"):
                await engine.submit(made_up)

    run(ask(range(1)))
    before = series()
    failed = {"endpoint": "embeddings", "model": "unknown", "plan": "none", "code": "404"}
    count = total(registry, "requests_total", **failed)
    run(ask(range(1, 10_001)))
    assert series() == before
    assert total(registry, "requests_total", **failed) == count + 10_000
