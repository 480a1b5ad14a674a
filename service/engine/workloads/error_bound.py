"""What a sparse run may err: the rules that attention and forward passes share."""

from __future__ import annotations

from typing import Any

from service.attention.sparse.bounded_error import ErrorBound
from service.config import Config
from service.core.options import AttentionOptions, ForwardOptions
from service.engine.workloads.base import PlannedWork
from service.planning import planner


def error_bound(
    work: PlannedWork[Any], options: AttentionOptions | ForwardOptions, config: Config, seed: int
) -> ErrorBound:
    """The bound of a work with a sparse plan; `seed` draws the rows of its audit."""
    assert work.plan.epsilon is not None, "bug: a sparse plan without epsilon"
    return ErrorBound(
        max_error=planner.max_error(options, config),
        exact_kind=work.exact_kind,
        epsilon=work.plan.epsilon,
        block_size=work.plan.block_size,
        audit_rows=config.audit_rows,
        seed=seed,
        max_density=None if options.mode == "sparse" else config.max_density,
    )
