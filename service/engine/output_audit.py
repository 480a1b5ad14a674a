"""What sparse attention did to the answers: some sparse forward passes are run again exactly, when nobody waits.

The audits inside a pass measure each attention call; only this measures what the errors became at the model's output.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from service.core.plan import PlanKind
from service.engine.runner import Job, Outcome

MAX_WAITING = 4  # sparse answers held for their audit: each keeps its output
MAX_BYTES = 64 * 1024**2  # of one output that is held


@dataclass(slots=True, eq=False)
class Audit:
    """An exact run of `job` to compare with what was answered."""

    job: Job
    answered: Mapping[str, torch.Tensor]


class OutputAudits:
    """Which answers are audited, and those that wait for an idle device."""

    def __init__(self, share: float, seed: int = 0) -> None:
        self._share = share
        self._draw = random.Random(seed)  # noqa: S311 (a sample, not a secret)
        self._waiting: deque[Audit] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def consider(self, job: Job, outcome: Outcome) -> None:
        """Keep a share of the sparse forward answers; more than a few at a time are let go."""
        if outcome.plan.kind is not PlanKind.SPARSE or not outcome.layers or self._draw.random() >= self._share:
            return
        size = sum(tensor.nbytes for tensor in outcome.tensors.values())
        if outcome.tensors and size <= MAX_BYTES and len(self._waiting) < MAX_WAITING:
            exact = replace(job.plan, kind=job.exact_kind, selection=None, epsilon=None, reason="audit of the output")
            again = replace(job, plan=exact, cancelled=False, deadline_s=float("inf"))
            self._waiting.append(Audit(again, outcome.tensors))

    def next(self) -> Audit | None:
        return self._waiting.popleft() if self._waiting else None


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
    got, right = answered["hidden_states"].float(), exact["hidden_states"].float()
    return "relative_l2", float((got - right).norm() / right.norm().clamp(min=1e-20))
