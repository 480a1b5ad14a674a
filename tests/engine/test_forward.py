"""Forward passes through the engine: sparse layers told, audited at the output, models of every task batched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers as hf
from prometheus_client import CollectorRegistry

from service.config import Config, ModelConfig
from service.core.answer import Answer
from service.core.plan import PlanKind
from service.core.request import ForwardRequest
from service.engine.engine import Engine
from service.engine.job import AnswerSink, Job
from service.engine.output_audit import MAX_WAITING, OutputAudits, output_error
from service.engine.workloads.base import Outcome
from service.errors import FarsightError, Kind
from service.telemetry.metrics import Metrics
from tests.engines import record_of
from tests.models import zoo
from tests.models.common import asked

LENGTH = 1500
T = TypeVar("T")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """decoder, ranker, encoder; a model repository."""
    root = tmp_path_factory.mktemp("models")
    zoo.save("llama", hf.AutoModelForCausalLM, root / "decoder", max_position_embeddings=4096)
    zoo.save("bert", hf.AutoModelForSequenceClassification, root / "ranker", id2label={0: "relevant"})
    zoo.save("modernbert", hf.AutoModel, root / "encoder")
    return root


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="module")
def engine(directory: Path, registry: CollectorRegistry) -> Iterator[Engine]:
    models = tuple(ModelConfig(name=name, path=str(directory / name)) for name in ("decoder", "ranker"))
    config = Config(models=models, output_audit_share=1.0, model_repository=directory, model_control=True)
    engine = Engine.start(config, Metrics(registry))
    yield engine
    engine.close()


def ids(seed: int, length: int = LENGTH) -> tuple[int, ...]:
    return tuple(torch.randint(10, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(task: Any, *texts: str, model: str, **fields: Any) -> ForwardRequest:
    return replace(asked(task, *texts, **fields), model=model)


def run(engine: Engine, work: Coroutine[Any, Any, T]) -> T:
    """Until the device is idle: an audit that runs on would report to a loop that has ended."""

    async def until_idle() -> T:
        result = await work
        while engine.execution.is_auditing:  # noqa: ASYNC110 (the engine has no event for tests)
            await asyncio.sleep(0.005)
        return result

    return asyncio.run(until_idle())


def submit(engine: Engine, *requests: ForwardRequest) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return list(await asyncio.gather(*(engine.submit(one) for one in requests)))

    return run(engine, all_of_them())


def test_sparse_layers_are_told_and_audited_at_the_output(engine: Engine, registry: CollectorRegistry) -> None:
    sparse = request("hidden", model="decoder", token_ids=(ids(0),), mode="sparse", max_error=1.0, layer_errors=True)

    async def both() -> tuple[Answer, Answer]:
        answer = await engine.submit(sparse)
        for _ in range(200):  # the audit runs once the device is idle
            if registry.get_sample_value("farsight_audit_output_error_count", labels):
                break
            await asyncio.sleep(0.02)
        exact = await engine.submit(replace(sparse, options=sparse.options.model_copy(update={"mode": "dense"})))
        return answer, exact

    labels = {"model": "decoder", "measure": "relative_l2"}
    answer, exact = run(engine, both())
    assert answer.plan.kind is PlanKind.SPARSE
    assert len(answer.layers) == 3
    sparse_layers = [layer for layer in answer.layers if layer.density is not None]
    assert sparse_layers
    assert answer.error.relative_l2_upper == max(layer.error.relative_l2_upper for layer in sparse_layers)
    assert answer.usage.pairs_scored == sum(layer.pairs_scored for layer in answer.layers)
    assert answer.usage.pairs_dense == 3 * 4 * LENGTH * (LENGTH + 1) // 2
    measure, error = output_error(answer.tensors, exact.tensors)
    assert measure == "relative_l2"
    assert registry.get_sample_value("farsight_audit_output_error_sum", labels) == pytest.approx(error, rel=0.05)
    seconds = {"model": "decoder", "tenant": "audit"}
    assert any(
        registry.get_sample_value("farsight_device_seconds_total", {**seconds, "plan": kind}) for kind in PlanKind
    )


def test_a_layer_over_the_bound_is_computed_exactly(engine: Engine) -> None:
    tight = request("hidden", model="decoder", token_ids=(ids(1),), mode="sparse", max_error=1e-8, layer_errors=True)
    (answer,) = submit(engine, tight)
    (exact,) = submit(engine, replace(tight, options=tight.options.model_copy(update={"mode": "dense"})))
    assert answer.error.fallback
    difference = answer.tensors["hidden_states"] - exact.tensors["hidden_states"]
    assert difference.norm() <= 1e-4 * exact.tensors["hidden_states"].norm()
    assert "attention calls were sparse" in answer.plan.reason or "computed exactly" in answer.plan.reason


def test_an_audit_gives_way_to_requests(engine: Engine) -> None:
    long = request("hidden", model="decoder", token_ids=(ids(2, 4000),), mode="sparse", max_error=1.0)

    async def then_short() -> float:
        await engine.submit(long)
        await asyncio.sleep(0.001)
        start = time.perf_counter()
        await engine.submit(request("score", "tired", model="decoder"))
        return time.perf_counter() - start

    assert run(engine, then_short()) < 2.0


def test_only_a_few_answers_wait_for_their_audit(engine: Engine) -> None:
    sparse = request("hidden", model="decoder", token_ids=(ids(3),), mode="sparse", max_error=1.0)
    (answer,) = submit(engine, sparse)

    async def job() -> Job:
        return Job(await engine.pricing.plan(sparse, 0.0, float("inf"), record_of(sparse)), AnswerSink())

    planned = asyncio.run(job())
    outcome = Outcome(answer.tensors, answer.plan, answer.error, 1, layers=answer.layers)
    audits, waiting = OutputAudits(1.0), []
    for _ in range(10):
        audit = audits.audit_of(planned, outcome, len(waiting))
        waiting += [] if audit is None else [audit]
    assert len(waiting) == MAX_WAITING
    assert all(audit.work.plan.kind is not PlanKind.SPARSE for audit in waiting)
    assert OutputAudits(0.0).audit_of(planned, outcome, 0) is None


def test_tasks_answer_and_share_batches(engine: Engine, registry: CollectorRegistry) -> None:
    pairs = tuple(("the animal", text) for text in ("tired", "documents are long", "street"))
    scores = [request("score", text, model="decoder", top_k=k) for text, k in (("it was tired", 0), ("the street", 2))]
    ranked, *scored = submit(engine, request("rerank", model="ranker", pairs=pairs), *scores)
    assert ranked.tensors["scores"].shape == (3, 1)
    assert ((ranked.tensors["scores"] > 0) & (ranked.tensors["scores"] < 1)).all()
    assert [len(one.details) for one in scored] == [1, 1]
    assert "top" not in scored[0].details[0]
    assert len(scored[1].details[0]["top"][0]["next"]) == 2
    assert registry.get_sample_value("farsight_padding_ratio") == 0.0


def test_a_pass_that_was_slow_at_load_is_not_predicted_forever(engine: Engine) -> None:
    model = engine.models.model("ranker")
    slow = replace(model, info=replace(model.info, smallest_pass_s=60.0))
    engine.models._put(replace(engine.models.entry("ranker"), model=slow))
    engine.pricing.forward._fastest_s.clear()
    pair = request("rerank", model="ranker", pairs=(("the animal", "tired"),))
    first, second = submit(engine, pair)[0], submit(engine, pair)[0]
    assert first.plan.predicted_s / first.plan.correction > 60
    assert second.plan.predicted_s / second.plan.correction < 5


def test_what_a_model_is_not_for_is_refused(engine: Engine) -> None:
    for wrong in (
        request("embed", "a", model="decoder"),
        request("score", "a", model="ranker"),
        request("rerank", model="decoder", pairs=(("a", "b"),)),
    ):
        with pytest.raises(FarsightError, match="is for") as caught:
            submit(engine, wrong)
        assert caught.value.code == "wrong_task"
    with pytest.raises(FarsightError, match='truncate "chunk" is for embeddings'):
        submit(engine, request("score", "a", model="decoder", truncate="chunk"))


def test_models_come_and_go_while_serving(engine: Engine) -> None:
    text = request("embed", "tired", model="encoder")

    async def scenario() -> None:
        with pytest.raises(FarsightError, match="'encoder' is not served"):
            await engine.submit(text)
        serving = asyncio.create_task(engine.submit(request("score", "tired", model="decoder")))
        await engine.load_model("encoder")
        assert (await serving).details
        assert (await engine.submit(text)).tensors["embedding"].shape == (1, 32)
        begun = asyncio.create_task(engine.submit(text))
        await asyncio.sleep(0)
        await engine.unload_model("encoder")
        assert (await begun).tensors["embedding"].shape == (1, 32)
        with pytest.raises(FarsightError, match="'encoder' is not ready: unloaded") as caught:
            await engine.submit(text)
        assert caught.value.kind is Kind.UNAVAILABLE
        for name in ("..", "nope", "/etc"):
            with pytest.raises(FarsightError) as unknown:
                await engine.load_model(name)
            assert unknown.value.kind is Kind.NOT_FOUND

    run(engine, scenario())


def test_several_replicas_change_models_by_configuration_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.manager, "_config", engine.config.model_copy(update={"replicas": 2}))
    with pytest.raises(FarsightError, match="user_config"):
        asyncio.run(engine.load_model("encoder"))
