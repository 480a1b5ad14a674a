"""Classification and language model heads on packed hidden states; a model's own head would see one sequence only.

Each rule is checked at load against the model's own forward pass (`loading/verify.py`). A model without a rule, or
whose rule fails the check, runs its own forward pass on batches of equal length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Classifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # states [T, H], bounds [S + 1] -> logits [S, labels]


def packed_classifier(module: Any) -> Classifier | None:
    """The classification head of `module` for packed sequences, or None if no rule covers this kind of head."""
    config = module.config
    if isinstance(getattr(module, "score", None), nn.Linear):  # decoders: the last token
        return lambda states, bounds: module.score(last_of(states, bounds))
    head = getattr(module, "classifier", None)
    if head is None:
        return None
    pooler = getattr(module.base_model, "pooler", None)
    if pooler is not None and isinstance(head, nn.Linear):  # BERT: first token through the pooler
        return lambda states, bounds: head(pooler(first_of(states, bounds)[:, None]))
    if hasattr(module, "pre_classifier"):  # DistilBERT
        return lambda states, bounds: head(torch.relu(module.pre_classifier(first_of(states, bounds))))
    if hasattr(config, "classifier_pooling"):  # ModernBERT
        pool = first_of if config.classifier_pooling == "cls" else mean_of
        return lambda states, bounds: head(module.head(pool(states, bounds)))
    if hasattr(head, "out_proj"):  # RoBERTa
        return lambda states, bounds: head(first_of(states, bounds)[:, None])
    return None


def first_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """states [T, H], bounds [S + 1] -> [S, H]: the first token of each sequence."""
    return states[bounds[:-1]]


def last_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """states [T, H], bounds [S + 1] -> [S, H]: the last token of each sequence."""
    return states[bounds[1:] - 1]


def mean_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """states [T, H], bounds [S + 1] -> [S, H]: the mean over each sequence."""
    lengths = bounds.diff()
    segments = torch.repeat_interleave(torch.arange(len(lengths), device=states.device), lengths)
    sums = states.new_zeros(len(lengths), states.shape[1])
    return sums.index_add_(0, segments, states) / lengths[:, None]


def next_token_logits(module: Any, states: torch.Tensor) -> torch.Tensor:
    """states [T, H] -> logits [T, vocabulary] float32, capped as the model's configuration says."""
    logits: torch.Tensor = module.get_output_embeddings()(states).float()
    softcap = getattr(module.config, "final_logit_softcapping", None)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
