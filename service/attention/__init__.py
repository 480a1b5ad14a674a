"""Attention as pure functions of tensors. `dispatch.attend` runs one kind of it, exact or sparse.

`sparse.bounded_error.attend_with_error_bound` runs sparse attention and measures its error.
"""

from __future__ import annotations

DEFAULT_BLOCK_SIZE = 128  # tokens of a key block
DEFAULT_EPSILON = 0.4  # risk that a row may leave in a block that is not read
ERROR_EXPONENT = 0.75  # measured on structured inputs: errors fall like epsilon to this power


def scaled_epsilon(epsilon: float, factor: float) -> float:
    """The epsilon for an error so many times as large."""
    return float(min(1.0, max(1e-6, epsilon * factor ** (1 / ERROR_EXPONENT))))
