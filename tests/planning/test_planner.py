"""Which plan, and why: pure functions of sizes, options, profile and configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.config import Config
from service.core.model_info import LayerKind, MatrixSizes, ModelInfo
from service.core.options import AttentionOptions, EmbedOptions
from service.core.plan import PlanKind
from service.core.request import AttentionShape, ForwardRequest
from service.errors import FarsightError, Kind
from service.planning import attention_plan, forward_plan, planner
from service.planning.correction import PredictionCorrector, uncorrected
from service.planning.device_profile import DeviceProfile
from service.planning.forward_cost import forward_cost

# seconds for a call, a launch, a number, a pair and a FLOP
SECONDS = {
    PlanKind.DENSE: (1e-4, 0.0, 1e-10, 0.0, 1e-11),
    PlanKind.CHUNKED: (5e-4, 1e-5, 1e-10, 0.0, 1.6e-11),
    PlanKind.SPARSE: (2e-3, 1e-5, 1e-9, 1e-9, 2e-11),
}
PROFILE = DeviceProfile(
    device="cpu",
    attention_s_per={(kind, dtype): SECONDS[kind] for kind in PlanKind for dtype in ("float32", "bfloat16", "float16")},
    linear_flops_per_s={"float32": 1e11, "bfloat16": 1e11, "float16": 1e11},
    free_bytes=8 * 1024**3,
)
SHORT = AttentionShape(1, 8, 8, 512, 512, 64, 64)
LONG = AttentionShape(1, 8, 8, 32768, 32768, 64, 64)


def plan(shape: AttentionShape, **options: object) -> PlanKind:
    return attention_plan.plan_attention(shape, AttentionOptions.model_validate(options), PROFILE, Config()).kind


def test_length_decides() -> None:
    assert plan(SHORT) is PlanKind.DENSE
    assert plan(LONG) is PlanKind.SPARSE


def test_exact_only_is_never_sparse() -> None:
    assert plan(LONG, max_error=0) is PlanKind.DENSE


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_a_mode_that_is_asked_for_is_kept(mode: str) -> None:
    assert plan(SHORT, mode=mode) == mode
    assert plan(LONG, mode=mode) == mode


def test_the_reason_names_all_three_predictions() -> None:
    reason = attention_plan.plan_attention(LONG, AttentionOptions(), PROFILE, Config()).reason
    assert reason.startswith("32768 keys: dense ")
    assert "chunked " in reason
    assert "sparse " in reason


def test_what_does_not_fit_memory_is_refused_with_both_numbers() -> None:
    huge = replace(SHORT, query_length=1_000_000, value_dim=100_000, key_length=8)
    with pytest.raises(FarsightError) as caught:
        plan(huge)
    assert caught.value.kind is Kind.TOO_LARGE
    assert str(planner.max_peak_bytes(PROFILE, Config())) in caught.value.message


@pytest.mark.parametrize("allowed", [0.0, 0.02])
def test_a_refusal_names_an_exact_plan_unless_sparse_is_forced(allowed: float) -> None:
    """Sparse is the fastest of those that do not fit, but for other reasons than the memory limit."""
    options, config = AttentionOptions(max_error=allowed), Config(max_peak_bytes=1, sparse_min_tokens=10**6)
    with pytest.raises(FarsightError, match=r"^(dense|chunked) attention needs \d+ bytes, over the limit of 1 bytes$"):
        attention_plan.plan_attention(LONG, options, PROFILE, config)


def test_a_plan_that_fits_replaces_a_faster_one_that_does_not() -> None:
    options = AttentionOptions()
    priced = attention_plan.attention_candidates(LONG, options, PROFILE, Config())
    assert plan(LONG) is PlanKind.SPARSE
    between = (priced[PlanKind.DENSE].cost.peak_bytes + priced[PlanKind.SPARSE].cost.peak_bytes) // 2
    assert priced[PlanKind.SPARSE].cost.peak_bytes > between
    config = Config(max_peak_bytes=between)
    assert attention_plan.plan_attention(LONG, options, PROFILE, config).kind is PlanKind.DENSE
    # where dense attention is too large as well, chunked replaces a sparse answer that errs
    priced = attention_plan.attention_candidates(LONG, options, PROFILE, config)
    small = {kind: replace(one, fits=kind is PlanKind.CHUNKED) for kind, one in priced.items()}
    assert planner.exact_kind(priced, PredictionCorrector()) is PlanKind.DENSE
    assert planner.exact_kind(small, PredictionCorrector()) is PlanKind.CHUNKED


def test_what_was_learned_changes_a_choice_only_where_it_promises_much() -> None:
    shape, options = replace(LONG, query_length=8192, key_length=8192), AttentionOptions()
    priced = attention_plan.attention_candidates(shape, options, PROFILE, Config())
    sparse, dense = priced[PlanKind.SPARSE], priced[PlanKind.DENSE]
    equal = dense.predicted_s / sparse.predicted_s
    assert 1 < equal < 5  # corrections are bounded by 8
    corrector, kinds = PredictionCorrector(), []
    for slower in (1.0, 1.1 * equal, 0.9 * equal, 1.5 * equal):
        for _ in range(100):
            corrector.learn(dense.path, dense.predicted_s, dense.predicted_s)
            corrector.learn(sparse.path, sparse.predicted_s, slower * sparse.predicted_s)
        kinds.append(attention_plan.choose_attention(priced, shape, options, Config(), corrector).kind)
    assert kinds == [PlanKind.SPARSE, PlanKind.SPARSE, PlanKind.SPARSE, PlanKind.DENSE]


def test_a_plan_tells_what_was_learned_and_what_without() -> None:
    corrector = PredictionCorrector()
    priced = attention_plan.attention_candidates(SHORT, AttentionOptions(), PROFILE, Config())
    dense = priced[PlanKind.DENSE]
    for _ in range(200):
        corrector.learn(dense.path, dense.predicted_s, 2 * dense.predicted_s)
    found = attention_plan.choose_attention(priced, SHORT, AttentionOptions(), Config(), corrector)
    assert found.predicted_s == pytest.approx(2 * dense.predicted_s, rel=0.05)
    assert found.shared_s == pytest.approx(2 * dense.shared_s, rel=0.05)
    assert uncorrected([found]) == (dense.path, pytest.approx(dense.predicted_s))
    assert planner.corrected(priced, corrector)[PlanKind.DENSE].predicted_s == pytest.approx(found.predicted_s)


@pytest.mark.parametrize("mode", ["dense", "chunked", "sparse"])
def test_a_plan_keeps_the_dense_price_of_its_request(mode: str) -> None:
    """With the correction that dense attention had when the request was planned."""
    corrector = PredictionCorrector()
    options = AttentionOptions.model_validate({"mode": mode, "returns": ("output", "weights"), "rows": (1, 2)})
    priced = attention_plan.attention_candidates(LONG, options, PROFILE, Config())
    dense = priced[PlanKind.DENSE]
    for _ in range(200):
        corrector.learn(dense.path, dense.predicted_s, 2 * dense.predicted_s)
    found = attention_plan.choose_attention(priced, LONG, options, Config(), corrector)
    assert found.cost == priced[PlanKind(mode)].cost
    assert found.dense_cost == dense.cost
    assert found.dense_s == pytest.approx(2 * dense.predicted_s, rel=0.05)


EMBED = ForwardRequest("r", "m", "embed", EmbedOptions())
INFO = ModelInfo(
    *("m", "embed", "bert", "float32", 512, 384, 384, 6, 12, 12, 32, 30522, 22_000_000, 384, 1536),
    weights=MatrixSizes(10_600_000),
    task_weights=MatrixSizes(10_600_000),
    attention=(LayerKind(6, is_causal=False),),
    packed=True,
)


def test_forward_work_grows_with_tokens_and_lengths() -> None:
    one = forward_plan.plan_forward(INFO, [(512, 0)], EMBED, PROFILE, Config())
    split = forward_plan.plan_forward(INFO, [(256, 0), (256, 0)], EMBED, PROFILE, Config())
    assert one.cost.pairs == 2 * split.cost.pairs
    assert one.predicted_s > split.predicted_s


def test_long_forward_passes_are_sparse_unless_exact_is_asked_for() -> None:
    def kind(length: int, **options: Any) -> PlanKind:
        request = replace(EMBED, options=EmbedOptions(**options))
        return forward_plan.plan_forward(INFO, [(length, 0), (5, 0)], request, PROFILE, Config()).kind

    assert kind(65536) is PlanKind.SPARSE
    assert kind(65536, max_error=0) is not PlanKind.SPARSE
    assert kind(4096) is not PlanKind.SPARSE
    assert kind(4096, mode="sparse") is PlanKind.SPARSE
    assert kind(64, mode="chunked") is PlanKind.CHUNKED
    with pytest.raises(FarsightError, match="got sparse: max_error 0 requires an exact answer"):
        kind(64, mode="sparse", max_error=0)


def test_a_sparse_forward_plan_costs_what_it_reads_and_keeps_the_dense_price() -> None:
    request, sizes = replace(EMBED, options=EmbedOptions(mode="sparse")), [(16384, 0)]
    priced = forward_plan.forward_candidates(INFO, sizes, request, PROFILE, Config())
    found = forward_plan.plan_forward(INFO, sizes, request, PROFILE, Config())
    assert found.cost == priced[PlanKind.SPARSE].cost
    assert found.dense_cost == priced[PlanKind.DENSE].cost
    assert found.cost.pairs < 0.5 * found.dense_cost.pairs
    assert found.dense_s == priced[PlanKind.DENSE].predicted_s


def test_windowed_layers_cost_their_windows() -> None:
    windowed = replace(INFO, attention=(LayerKind(6, is_causal=True, window=(127, 0)),))
    work = forward_cost(windowed, [(4096, 0)], EMBED, max_batch_tokens=16384)
    assert work.pairs == 6 * 12 * sum(min(row + 1, 128) for row in range(4096))


def test_epsilon_follows_the_error_that_is_allowed() -> None:
    def epsilon(allowed: float) -> float | None:
        options = AttentionOptions(max_error=allowed)
        return attention_plan.plan_attention(LONG, options, PROFILE, Config()).epsilon

    assert epsilon(0.02) == pytest.approx(0.4)
    found = [epsilon(allowed) for allowed in (0.001, 0.01, 0.02, 0.05, 1.0)]
    assert found == sorted(found, key=lambda x: x or 0)
    assert found[0] is not None
    assert 0 < found[0] < 0.01
    assert found[-1] == 1.0


def test_more_audit_rows_cost_more() -> None:
    def predicted(rows: int) -> float:
        options = AttentionOptions(mode="sparse", audit_rows=rows)
        return attention_plan.plan_attention(LONG, options, PROFILE, Config()).predicted_s

    extra_pairs = 400 * 8 * 32768
    assert predicted(459) - predicted(59) == pytest.approx(extra_pairs * (1e-9 + 2e-11 * 256))


def test_returned_weights_cost_time() -> None:
    for mode in ("dense", "chunked", "sparse"):
        plain, weighed = (
            attention_plan.plan_attention(
                SHORT, AttentionOptions(mode=mode, returns=returns), PROFILE, Config()
            ).predicted_s
            for returns in (("output",), ("output", "weights"))
        )
        assert weighed > plain


def test_a_smaller_error_reads_more() -> None:
    def predicted(allowed: float) -> float:
        options = AttentionOptions(mode="sparse", max_error=allowed)
        return attention_plan.plan_attention(LONG, options, PROFILE, Config()).predicted_s

    assert predicted(0.001) > 1.3 * predicted(0.02)


def test_forced_sparse_that_may_not_err_is_a_contradiction() -> None:
    with pytest.raises(FarsightError) as caught:
        plan(LONG, mode="sparse", max_error=0)
    assert caught.value.kind is Kind.INVALID


def test_what_a_batch_pays_once_is_part_of_the_prediction() -> None:
    plan = attention_plan.plan_attention(SHORT, AttentionOptions(), PROFILE, Config())
    assert plan.shared_s == 1e-4
    assert plan.predicted_s > plan.shared_s
