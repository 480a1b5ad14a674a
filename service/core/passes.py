"""How the inputs of a batch are divided into forward passes: one rule for the models that run them and the cost model
that prices them."""

from __future__ import annotations

from collections.abc import Sequence


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """lengths [n] -> index ranges, one for each pass, in order; at most `max_tokens` tokens in each.

    For packed models. An input longer than `max_tokens` gets a pass of its own.
    """
    passes: list[range] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > max_tokens:
            passes.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    if start < len(lengths):
        passes.append(range(start, len(lengths)))
    return passes


def split_by_shape(shapes: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """shapes [n] -> indices of each pass; all inputs of a pass have the same shape, so none needs padding.

    For models that cannot take packed sequences. The tokens of an input are the sum of its shape. A pass has at most
    `max_tokens` tokens, but at least one input.
    """
    same_shape: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        same_shape.setdefault(shape, []).append(index)
    passes = []
    for shape, indices in same_shape.items():
        step = max(1, max_tokens // max(1, sum(shape)))
        passes += [indices[start : start + step] for start in range(0, len(indices), step)]
    return passes
