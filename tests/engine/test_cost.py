"""Closed forms against counting, and against torch's own counter where causality plays no part."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from service.core import AttentionOptions, AttentionShape, EmbedOptions, ForwardRequest, LayerKind, ModelInfo, PlanKind
from service.engine import cost

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
    work = cost.attention_work(PlanKind.DENSE, shape, AttentionOptions(), block_size=128)
    assert work.flops == counter.get_total_flops()


def test_forward_flops_equal_torchs_count() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False).eval()
    linear = sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Linear))
    info = ModelInfo(
        *("m", "embed", "bert", "float32", 64, 32, 3, 4, 4, 8, 50, 1, 32, 64, linear),
        attention=(LayerKind(3, is_causal=False),),
        packed=True,
    )
    request = ForwardRequest("r", "m", "embed", EmbedOptions())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 21, dtype=torch.long))
    assert cost.forward_work(info, [21], request, max_batch_tokens=64).flops == counter.get_total_flops()


def test_sparse_counts_selection_beside_its_pairs() -> None:
    shape = AttentionShape(1, 2, 1, 16384, 16384, 64, 32)
    dense = cost.attention_work(PlanKind.DENSE, shape, AttentionOptions(), block_size=128)
    sparse = cost.attention_work(PlanKind.SPARSE, shape, AttentionOptions(), block_size=128)
    assert sparse.pairs < 0.2 * dense.pairs
    looked_at = 2 * 2048 * 128  # every 8th row of both heads with every block
    products = 2 * looked_at * (3 * 64 + 32) + 16384 * 2 * 64 * 64
    assert sparse.flops - cost.pair_flops(sparse.pairs, 64, 32) == products


def test_sparse_never_reads_more_than_there_is() -> None:
    assert cost.sparse_pairs(1000, 10) == 1000
    assert cost.sparse_pairs(10**6, 10) == 10 * (450 + 800)
    assert cost.sparse_pairs(0, 0) == 0


def test_the_effort_of_exact_plans_is_their_pairs() -> None:
    shape = AttentionShape(2, 8, 2, 1000, 3000, 64, 32)
    options = AttentionOptions(is_causal=True)
    pairs = cost.attention_pairs(shape, options)
    dense, chunked = (
        cost.attention_effort(kind, shape, options, block_size=128) for kind in (PlanKind.DENSE, PlanKind.CHUNKED)
    )
    numbers = (2 * 8 * 1000 + 2 * 2 * 3000) * 96
    tiled = pairs + 2 * 8 * 1000 * 256  # half a tile of 512 keys a row is computed and hidden
    assert tuple(dense) == (1, 0, numbers, tiled, cost.pair_flops(tiled, 64, 32))
    assert tuple(chunked) == (1, 2 * 5, numbers, tiled, dense.flops)
    whole = cost.attention_effort(PlanKind.DENSE, shape, AttentionOptions(), block_size=128)
    assert whole.pairs == 2 * 8 * 1000 * 3000
    ragged = AttentionOptions(kv_lengths=(3000, 1000))
    assert cost.attention_effort(PlanKind.DENSE, shape, ragged, block_size=128).calls == 2


def test_peak_counts_an_output_far_larger_than_the_inputs() -> None:
    shape = AttentionShape(1, 1, 1, 100_000, 1, 1, 1_000_000)
    work = cost.attention_work(PlanKind.CHUNKED, shape, AttentionOptions(), block_size=128)
    assert work.peak_bytes > 4 * 100_000 * 1_000_000
