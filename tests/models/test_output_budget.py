"""What layers may err for a bound on the last hidden state, and how far their errors reach."""

from __future__ import annotations

import json
from dataclasses import replace
from math import hypot
from pathlib import Path

import pytest
import torch
import transformers as hf

from service.attention.sparse.bounded_error import ErrorBound
from service.config import ModelConfig
from service.core.answer import ErrorReport, LayerReport
from service.core.plan import PlanKind
from service.models.hook import ForwardContext
from service.models.inputs.rows import EncodedInput
from service.models.loading import gains
from service.models.loading.load import load
from service.models.loading.probe import probe_context
from service.models.output_budget import AIM, COHERENCE, MAX_LAYER_ERROR, TOLERANCE, OutputBudget
from tests.models import zoo
from tests.models.common import SETTINGS

GAINS = (0.3, 0.1, 0.1, 0.2)


def measured(upper: float, estimate: float | None = None) -> LayerReport:
    error = ErrorReport("measured", relative_l2=upper if estimate is None else estimate, relative_l2_upper=upper)
    return LayerReport(PlanKind.SPARSE, error, 0.1, 1)


EXACT = LayerReport(PlanKind.DENSE, ErrorReport(), None, 1)


def spent(budget: OutputBudget, share: float = 1.0) -> list[LayerReport]:
    """One pass whose calls err by this share of what they may."""
    done: list[LayerReport] = []
    for _ in budget.gains:
        done.append(measured(share * budget.layer_error(done)[0] / AIM))
    return done


def test_a_budget_that_is_spent_keeps_to_the_bound() -> None:
    budget = OutputBudget(GAINS, 0.05)
    done = spent(budget)
    estimate, upper = budget.output_error(done)
    assert upper == pytest.approx(0.05)
    assert estimate == pytest.approx(0.05)
    assert upper == pytest.approx(
        COHERENCE * hypot(*(g * d.error.relative_l2_upper for g, d in zip(GAINS, done, strict=True)))
    )
    # a call that reaches further may err less, by less than it reaches further
    first, second = (layer.error.relative_l2_upper for layer in done[:2])
    assert second / 3 < first < second
    assert budget.layer_error(done) == budget.layer_error([]), "the next pass begins anew"
    worst = budget.output_error([*done, *spent(OutputBudget(GAINS, 0.01))])
    assert worst == pytest.approx((estimate, upper)), "of the worst pass"


def test_what_a_call_leaves_over_the_next_ones_may_use() -> None:
    budget = OutputBudget(GAINS, 0.05)
    full, (saved, _) = spent(budget), budget.layer_error([EXACT])
    assert saved / AIM > 1.2 * full[1].error.relative_l2_upper
    assert budget.output_error([EXACT, *spent(budget)[1:]])[1] < 0.05
    assert budget.output_error([EXACT, measured(saved), EXACT, EXACT])[1] < 0.05
    assert OutputBudget((1e-4,), 0.5).layer_error([]) == (AIM * MAX_LAYER_ERROR, MAX_LAYER_ERROR)
    assert budget.layer_error([measured(1.0)]) == (0.0, 0.0), "nothing is left"


def test_a_call_may_be_further_off_than_its_part_but_never_all_of_them() -> None:
    budget = OutputBudget(GAINS, 0.05)
    aim, bound = budget.layer_error([])
    assert aim < bound <= TOLERANCE * aim / AIM
    done: list[LayerReport] = []
    for _ in GAINS:  # each errs by all that it may
        done.append(measured(budget.layer_error(done)[1]))
    assert budget.output_error(done)[1] == pytest.approx(0.05)
    last = budget.layer_error(done[:3])
    assert last[0] == pytest.approx(AIM * last[1]), "the last call has what is left"


def test_gains_are_what_noise_does_to_the_states_and_are_kept(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModelForCausalLM, tmp_path / "model")
    cache = tmp_path / "cache"
    model = load(ModelConfig(name="m", path=str(tmp_path / "model")), replace(SETTINGS, cache_dir=cache))
    found = model.info.error_gains
    assert len(found) == model.info.num_layers
    assert all(0.001 < gain < 10 for gain in found)
    # noise of another size and draw on one call, other tokens: the same gain, nearly
    row = EncodedInput(tuple(range(20, 80)))
    with torch.inference_mode():
        exact = next(model.hidden_states([row], probe_context())).states
        noise = torch.Generator().manual_seed(99)

        def disturb(call: int, out: torch.Tensor) -> torch.Tensor:
            made = torch.randn(out.shape, generator=noise)
            return out + 0.02 * made * out.norm() / made.norm() if call == 1 else out

        off = next(model.hidden_states([row], replace(probe_context(), disturb=disturb))).states - exact
    assert float(off.norm() / exact.norm()) / 0.02 == pytest.approx(found[1], rel=0.5)

    (kept,) = cache.glob("gains-*.json")
    kept.write_text(json.dumps([0.5] * len(found)))
    assert gains.with_gains(model, cache).info.error_gains == (0.5,) * len(found), "read, not measured again"
    for broken in ("[]", "[0.1, -1]", '["x"]', "{"):
        kept.write_text(broken)
        assert gains.with_gains(model, cache).info.error_gains == found
    cache_file = tmp_path / "file"
    cache_file.write_text("")
    assert gains.with_gains(model, cache_file / "below").info.error_gains == found, "a directory that cannot be made"
    # other weights are another model
    with torch.no_grad():
        next(model.base.parameters()).add_(1.0)
    gains.with_gains(model, cache)
    assert len(list(cache.glob("gains-*.json"))) == 2


def test_models_of_short_inputs_and_of_targets_have_no_gains(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModelForCausalLM, tmp_path / "short", max_position_embeddings=512)
    model = load(ModelConfig(name="m", path=str(tmp_path / "short")), replace(SETTINGS, sparse_min_tokens=513))
    assert model.info.error_gains == ()
    zoo.save("t5", hf.AutoModelForSeq2SeqLM, tmp_path / "t5")
    assert load(ModelConfig(name="t", path=str(tmp_path / "t5"), task="score"), SETTINGS).info.error_gains == ()


def test_each_call_of_a_sparse_pass_is_bound_by_the_budget(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModelForCausalLM, tmp_path, max_position_embeddings=2048)
    model = load(ModelConfig(name="m", path=str(tmp_path)), SETTINGS)
    row = EncodedInput(tuple(torch.randint(10, 128, (1500,), generator=torch.Generator().manual_seed(0)).tolist()))
    with torch.inference_mode():
        exact = next(model.hidden_states([row], probe_context())).states
        for max_error in (0.3, 0.01):
            budget = OutputBudget(model.info.error_gains, max_error)
            bound = ErrorBound(max_error, PlanKind.DENSE, max_density=None)
            context = ForwardContext(PlanKind.SPARSE, bound=bound, budget=budget)
            states = next(model.hidden_states([row], context)).states
            uppers = [layer.error.relative_l2_upper for layer in context.layers]
            assert all(upper <= budget.layer_error(context.layers[:index])[1] for index, upper in enumerate(uppers))
            estimate, upper = budget.output_error(context.layers)
            true = float((states - exact).norm() / exact.norm())
            assert true <= upper <= max_error
            assert estimate <= upper
