"""Closed forms against counting, and against torch's own counter where causality plays no part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from service.core.options import AttentionOptions, Task
from service.core.passes import split_by_shape, split_by_tokens
from service.core.plan import PlanKind
from service.core.request import AttentionShape
from service.models.hook import ForwardContext
from service.models.inputs.rows import EncodedInput
from service.planning import attention_cost as cost
from service.planning import forward_cost
from tests.models import zoo
from tests.models.common import asked, loaded
from tests.planning.test_planner import INFO

LENGTH = st.integers(1, 12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    query_length=LENGTH,
    key_length=LENGTH,
    valid=st.integers(0, 12),
    causal=st.booleans(),
    alignment=st.one_of(st.sampled_from(["bottom_right", "top_left"]), st.integers(-15, 15)),
    window=st.one_of(st.none(), st.tuples(st.integers(-1, 14), st.integers(-1, 14))),
)
def test_pairs_equal_counting(
    query_length: int,
    key_length: int,
    valid: int,
    causal: bool,
    alignment: str | int,
    window: tuple[int, int] | None,
) -> None:
    valid = min(valid, key_length)
    offset = {"bottom_right": valid - query_length, "top_left": 0}.get(str(alignment), alignment)
    assert isinstance(offset, int)
    left, right = window or (-1, -1)
    counted = sum(
        (not causal or key <= query + offset)
        and (left < 0 or key >= query + offset - left)
        and (right < 0 or key <= query + offset + right)
        for query in range(query_length)
        for key in range(valid)
    )
    shape = AttentionShape(1, 3, 3, query_length, key_length, 4, 4)
    options = AttentionOptions(is_causal=causal, causal_alignment=alignment, window=window, kv_lengths=(valid,))
    assert cost.attention_pairs(shape, options) == 3 * counted


def test_long_causal_ramp_is_counted_exactly_and_at_once() -> None:
    n = 1_000_000
    shape = AttentionShape(1, 1, 1, n, n, 64, 64)
    assert cost.attention_pairs(shape, AttentionOptions(is_causal=True)) == n * (n + 1) // 2


def test_heads_and_sequences_multiply() -> None:
    shape = AttentionShape(2, 8, 2, 16, 16, 64, 64)
    assert cost.attention_pairs(shape, AttentionOptions()) == 2 * 8 * 16 * 16
    assert cost.attention_pairs(shape, AttentionOptions(kv_lengths=(16, 4))) == 8 * (16 * 16 + 16 * 4)


def test_dense_flops_equal_torchs_count() -> None:
    shape = AttentionShape(2, 4, 4, 33, 47, 16, 16)
    query, key, value = torch.randn(2, 4, 33, 16), torch.randn(2, 4, 47, 16), torch.randn(2, 4, 47, 16)
    # the counter does not know the CPU's fused kernel; the math path is plain matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for kind in (PlanKind.DENSE, PlanKind.CHUNKED):
        work = cost.attention_cost(kind, shape, AttentionOptions())
        assert work.flops == counter.get_total_flops()


MODELS: dict[str, tuple[str, Any, Task]] = {
    "BERT": ("bert", hf.AutoModel, "embed"),
    "BERT, hidden states": ("bert", hf.AutoModelForSequenceClassification, "hidden"),
    "DistilBERT, classes": ("distilbert", hf.AutoModelForSequenceClassification, "classify"),
    "ModernBERT": ("modernbert", hf.AutoModel, "embed"),
    "GPT": ("gpt2", hf.AutoModelForCausalLM, "score"),
    "GPT, hidden states": ("gpt2", hf.AutoModelForCausalLM, "hidden"),
    "T5": ("t5", hf.AutoModelForSeq2SeqLM, "score"),
    "T5, encoder": ("t5", hf.AutoModel, "embed"),
    "BART": ("bart", hf.AutoModelForSeq2SeqLM, "score"),
    "BART, classes": ("bart", hf.AutoModelForSequenceClassification, "classify"),
    "ViT": ("vit", hf.AutoModelForImageClassification, "classify"),
    "ViT, embedding": ("vit", hf.AutoModel, "embed"),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_equal_torchs_count_of_eager_attention(name: str, tmp_path: Path) -> None:
    kind, head, task = MODELS[name]
    eager = zoo.save(kind, head, tmp_path)
    model = loaded(tmp_path)
    ids, target = [[1, *range(10, 30), 2]], [list(range(20, 29))]
    arguments: dict[str, torch.Tensor] = {"input_ids": torch.tensor(ids)}
    size = len(ids[0]), 0
    if kind == "vit":
        arguments, size = {"pixel_values": torch.rand(1, 3, 32, 32)}, (17, 0)
    elif task == "score" and model.inputs.spec.has_target:
        arguments["decoder_input_ids"], size = torch.tensor(target), (len(ids[0]), len(target[0]))
    called = eager
    if task == "hidden":
        called = eager.base_model
    elif task == "embed" and eager.config.is_encoder_decoder:
        called = eager.get_encoder()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        called(**arguments)
    info = model.info
    work = forward_cost.forward_cost(info, [size], asked(task, "x"), max_batch_tokens=64)
    # torch counts what eager attention computes and then hides
    layers = info.attention if task == "hidden" or info.task_attention is None else info.task_attention
    hidden = 0
    for one in layers:
        queries, keys = (size[1] if side == "target" else size[0] for side in (one.queries, one.keys))
        hidden += one.count * info.num_heads * (queries * keys - forward_cost.layer_pairs(one, [size]))
    assert work.flops + cost.pair_flops(hidden, info.head_dim, info.head_dim) == counter.get_total_flops()
    assert (hidden > 0) == any(one.is_causal or one.window for one in layers)


def test_forward_flops_of_batches_are_those_of_their_sequences_and_passes(tmp_path: Path) -> None:
    """Packed or not: a pooler works once in a pass, everything else for tokens and sequences."""
    zoo.save("bert", hf.AutoModelForSequenceClassification, tmp_path)
    info, request = loaded(tmp_path).info, asked("classify", "x")
    assert info.weights.once == 32 * 32
    assert info.task_weights.sequence == 32 * 32 + 2 * 32

    def flops(*lengths: int, most: int = 64) -> int:
        sizes = [(length, 0) for length in lengths]
        return forward_cost.forward_cost(info, sizes, request, max_batch_tokens=most).flops

    once = 2 * 32 * 32
    assert flops(20, 7, 30) == flops(20) + flops(7) + flops(30) - 2 * once  # one pass
    assert flops(20, 7, 30, most=30) == flops(20) + flops(7) + flops(30) - once  # two


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)
TEXT = st.builds(EncodedInput, ids=LENGTHS.map(tuple), target=st.none() | LENGTHS.map(tuple))
IMAGE = st.builds(EncodedInput, states=st.integers(1, 12))  # a model takes one or the other


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=st.lists(TEXT, max_size=20) | st.lists(IMAGE, max_size=20), packed=st.booleans(), most=st.integers(1, 40))
def test_passes_are_those_of_the_packing_rules(rows: list[EncodedInput], packed: bool, most: int) -> None:
    passes: Any = split_by_tokens([len(row) for row in rows], most)
    if not packed:
        passes = split_by_shape([(len(row.ids), len(row.target or ()), row.states) for row in rows], most)
    sizes = [(len(row.ids) + row.states, len(row.target or ())) for row in rows]
    expected = [sum(len(rows[index]) for index in indices) for indices in passes]
    assert forward_cost.pass_tokens(replace(INFO, packed=packed), sizes, most) == expected


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_passes_are_those_that_models_run(kind: str, tmp_path: Path) -> None:
    """Packed (BERT) or by equal length (T5)."""
    zoo.save(kind, hf.AutoModel, tmp_path)
    model = loaded(tmp_path)
    assert model.info.packed == (kind == "bert")

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(lengths=LENGTHS, most=st.integers(1, 40))
    def equal(lengths: list[int], most: int) -> None:
        context = ForwardContext(PlanKind.DENSE)
        rows = [EncodedInput(tuple(range(4, 4 + length))) for length in lengths]
        with torch.inference_mode():
            for _ in replace(model, max_batch_tokens=most).hidden_states(rows, context):
                pass
        sizes = [(length, 0) for length in lengths]
        assert forward_cost.pass_tokens(model.info, sizes, most) == context.positions

    equal()


def test_sparse_counts_selection_beside_its_pairs() -> None:
    shape = AttentionShape(1, 2, 1, 16384, 16384, 64, 32)
    dense = cost.attention_cost(PlanKind.DENSE, shape, AttentionOptions())
    sparse = cost.attention_cost(PlanKind.SPARSE, shape, AttentionOptions())
    assert sparse.pairs < 0.2 * dense.pairs
    looked_at = 2 * 2048 * 128  # every 8th row of both heads with every block
    products = 2 * looked_at * (3 * 64 + 32) + 16384 * 2 * 64 * 64
    assert sparse.flops - cost.pair_flops(sparse.pairs, 64, 32) == products


def test_sparse_never_reads_more_than_there_is() -> None:
    assert cost.sparse_pairs(1000, 10) == 1000
    assert cost.sparse_pairs(10**6, 10) == 10 * (450 + 800)
    assert cost.sparse_pairs(0, 0) == 0


def test_the_features_of_exact_plans_are_their_pairs() -> None:
    shape = AttentionShape(2, 8, 2, 1000, 3000, 64, 32)
    options = AttentionOptions(is_causal=True)
    pairs = cost.attention_pairs(shape, options)
    dense, chunked = (cost.attention_features(kind, shape, options) for kind in (PlanKind.DENSE, PlanKind.CHUNKED))
    numbers = (2 * 8 * 1000 + 2 * 2 * 3000) * 96
    tiled = pairs + 2 * 8 * 1000 * 256  # half a tile of 512 keys a row is computed and hidden
    assert tuple(dense) == (1, 0, numbers, tiled, cost.pair_flops(tiled, 64, 32))
    assert tuple(chunked) == (1, 2 * 5, numbers, tiled, dense.flops)
    whole = cost.attention_features(PlanKind.DENSE, shape, AttentionOptions())
    assert whole.pairs == 2 * 8 * 1000 * 3000
    ragged = AttentionOptions(kv_lengths=(3000, 1000))
    assert cost.attention_features(PlanKind.DENSE, shape, ragged).calls == 2


def test_costs_and_features_count_the_same_audited_pairs() -> None:
    shape, options = AttentionShape(1, 2, 2, 8192, 8192, 64, 64), AttentionOptions(is_causal=True)
    few, many = (
        (
            cost.attention_cost(PlanKind.SPARSE, shape, options, cost.SparseSettings(audit_rows=rows)).pairs,
            cost.attention_features(PlanKind.SPARSE, shape, options, cost.SparseSettings(audit_rows=rows)).pairs,
        )
        for rows in (59, 459)
    )
    assert many[0] - few[0] == many[1] - few[1] == pytest.approx(400 * 2 * 4096.5, abs=2)


def test_peak_counts_an_output_far_larger_than_the_inputs() -> None:
    shape = AttentionShape(1, 1, 1, 100_000, 1, 1, 1_000_000)
    work = cost.attention_cost(PlanKind.CHUNKED, shape, AttentionOptions())
    assert work.peak_bytes > 4 * 100_000 * 1_000_000


def test_a_sparse_peak_holds_the_scratch_of_selection_and_audit() -> None:
    """Gathered keys and values, scores and sums are alive together: four tiles of the kernel."""
    shape = AttentionShape(1, 8, 8, 8192, 8192, 64, 64)
    peak = cost.attention_cost(PlanKind.SPARSE, shape, AttentionOptions(is_causal=True)).peak_bytes
    tensors = 4 * 4 * 8 * 8192 * 64
    assert peak > tensors + 16 * 1024**2 + 6 * 4 * 8192 * 64
    assert cost.SPARSE_SCRATCH_BYTES == 16 * 1024**2


def test_peaks_count_what_is_kept_and_no_more() -> None:
    def peak(task: Task, **options: Any) -> int:
        return forward_cost.forward_cost(
            INFO, [(512, 0)] * 8, asked(task, "x", **options), max_batch_tokens=4096
        ).peak_bytes

    states = 4096 * 384 * 4
    assert peak("hidden") == peak("embed") + states
    assert peak("hidden", layer=3) == peak("hidden") + 7 * states

    shape = AttentionShape(1, 8, 8, 8192, 8192, 64, 64)

    def attention(**options: Any) -> int:
        found = AttentionOptions(is_causal=True, **options)
        return cost.attention_cost(PlanKind.DENSE, shape, found).peak_bytes

    tensors = 4 * 8 * 8192 * 64 * 4
    assert tensors < attention() < 1.2 * tensors
    assert attention(window=(1024, 0)) == attention() + 3 * 4 * 1024 * 2048
