"""What sparse attention did to the answers: some sparse forward passes are run again exactly, on an idle device.

The audits inside a pass measure each attention call; only this measures what the errors became at the model's output.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from service.core.plan import PlanKind
from service.engine.job import Job
from service.engine.workloads.base import Outcome

MAX_WAITING = 4  # sparse answers held for their audit: each keeps its output
MAX_BYTES = 64 * 1024**2  # of one output that is held


class OutputAudits:
    """Draws the answers that are audited."""

    def __init__(self, share: float, seed: int = 0) -> None:
        self._share = share
        self._draw = random.Random(seed)  # noqa: S311 (a sample, not a secret)

    def audit_of(self, job: Job, outcome: Outcome, waiting: int) -> Job | None:
        """The exact run that audits this answer, or None: only a share of the sparse forward passes is audited, and at
        most a few wait at a time."""
        if outcome.plan.kind is not PlanKind.SPARSE or not outcome.layers or self._draw.random() >= self._share:
            return None
        size = sum(tensor.nbytes for tensor in (*outcome.tensors.values(), *outcome.sampled))
        if not outcome.tensors or size > MAX_BYTES or waiting >= MAX_WAITING:
            return None
        work = job.work
        plan = replace(work.plan, kind=work.exact_kind, selection=None, epsilon=None, reason="audit of the output")
        planned = replace(job.planned, work=replace(work, plan=plan, is_audit=True), deadline_s=float("inf"))
        return Job(planned, job.sink, answered=outcome)


def state_error(answered: Outcome, exact: Outcome) -> float | None:
    """Relative L2 error of the last hidden state, by the rows that both sampled.

    None if there are none, or memory ran out and one of them ran in other passes.
    """
    if not answered.sampled or [one.shape for one in answered.sampled] != [one.shape for one in exact.sampled]:
        return None
    return _relative_l2(torch.cat(tuple(answered.sampled)), torch.cat(tuple(exact.sampled)))


def output_error(answered: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> tuple[str, float]:
    """(measure, error) of an answer: the worst row's cosine distance of embeddings, difference of scores, difference of
    log-probability per token, or the relative L2 of hidden states."""
    if "embedding" in exact:
        cosine = torch.nn.functional.cosine_similarity(answered["embedding"], exact["embedding"])
        return "cosine_distance", float((1 - cosine).max().clamp(min=0))
    if "scores" in exact:
        return "score_difference", float((answered["scores"] - exact["scores"]).abs().max())
    if "logprob_sum" in exact:
        difference = (answered["logprob_sum"] - exact["logprob_sum"]).abs() / exact["scored_tokens"].clamp(min=1)
        return "logprob_difference", float(difference.max())
    return "relative_l2", _relative_l2(answered["hidden_states"].float(), exact["hidden_states"].float())


def _relative_l2(answered: torch.Tensor, exact: torch.Tensor) -> float:
    return float((answered - exact).norm() / exact.norm().clamp(min=1e-20))
