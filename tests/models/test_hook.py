"""Who sees whom is read from the model's own mask function, and anything unknown is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import masking_utils

from service.core.plan import PlanKind
from service.models import hook
from service.models.hook import ForwardContext, Pattern

WINDOW = 4
FUNCTIONS: list[tuple[Callable[..., torch.Tensor], int | None, Pattern]] = [
    (masking_utils.bidirectional_mask_function, None, Pattern(is_causal=False)),
    (masking_utils.causal_mask_function, None, Pattern(is_causal=True)),
    (masking_utils.sliding_window_causal_mask_function(WINDOW), WINDOW, Pattern(is_causal=True, window=(3, 0))),
    (
        masking_utils.sliding_window_bidirectional_mask_function(WINDOW),
        WINDOW,
        Pattern(is_causal=False, window=(WINDOW, WINDOW)),
    ),
]


def read(
    function: Callable[..., torch.Tensor], local_size: int | None, length: int = 64, **arguments: object
) -> Pattern:
    with hook.running(ForwardContext(PlanKind.DENSE)):
        return hook.mask(1, length, length, function, local_size=local_size, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("function", "local_size", "pattern"), FUNCTIONS)
@pytest.mark.parametrize("length", [9, 64, 1000])
def test_patterns_are_read(
    function: Callable[..., torch.Tensor], local_size: int | None, pattern: Pattern, length: int
) -> None:
    assert read(function, local_size, length) == pattern


@pytest.mark.parametrize(
    ("function", "local_size"),
    [
        (masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.int64)), WINDOW),
        (lambda batch, head, query, key: (key <= query) | (key < 5), None),  # prefix
        (lambda batch, head, query, key: (key <= query) & (key != 0), None),  # a hidden first token
        (masking_utils.sliding_window_causal_mask_function(WINDOW), WINDOW + 1),  # said to be wider than it is
    ],
)
def test_other_patterns_are_refused(function: Callable[..., torch.Tensor], local_size: int | None) -> None:
    with pytest.raises(NotImplementedError, match="neither causal"):
        read(function, local_size)


def test_a_window_wider_than_the_first_input_is_not_lost() -> None:
    function = masking_utils.sliding_window_causal_mask_function(4096)
    assert read(function, 4096, length=17) == Pattern(is_causal=True, window=(4095, 0))
    function = masking_utils.sliding_window_bidirectional_mask_function(64)
    assert read(function, 64, length=17) == Pattern(is_causal=False, window=(64, 64))


def test_padding_masks_are_refused() -> None:
    padding = torch.ones(1, 64, dtype=torch.bool)
    assert read(masking_utils.causal_mask_function, None, attention_mask=padding) == Pattern(is_causal=True)
    padding[0, -1] = False
    with pytest.raises(NotImplementedError, match="padding mask"):
        read(masking_utils.causal_mask_function, None, attention_mask=padding)


def test_a_tensor_mask_is_refused_not_ignored() -> None:
    query = torch.zeros(1, 1, 2, 4)
    with hook.running(ForwardContext(PlanKind.DENSE)), pytest.raises(NotImplementedError, match="mask of its own"):
        hook.attention(torch.nn.Module(), query, query, query, torch.ones(1, 1, 2, 2))  # type: ignore[arg-type]
    sinks = {"s_aux": torch.zeros(1)}
    with hook.running(ForwardContext(PlanKind.DENSE)), pytest.raises(NotImplementedError, match="sinks"):
        hook.attention(torch.nn.Module(), query, query, query, Pattern(is_causal=True), **sinks)


def test_calls_that_were_no_use_sparse_are_exact_for_longer_and_longer() -> None:
    history = hook.SparseHistory()
    tried = []
    for number in range(200):
        if not history.skips(3):
            tried.append(number)
            history.learn(3, pays=False)
    assert tried == [0, 5, 14, 31, 64, 129, 194]  # after 4, 8, 16, 32, 64, 64 exact passes
    assert not history.skips(0)
    history.learn(3, pays=True)
    assert not history.skips(3)


def test_a_pass_without_its_context_is_a_bug() -> None:
    query = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="without its ForwardContext"):
        hook.attention(torch.nn.Module(), query, query, query, Pattern(is_causal=True))
