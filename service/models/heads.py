"""Classification and language model heads on packed hidden states; a model's own head would see one sequence only.

Each rule is checked at load against the model's own forward pass (`loading/verify.py`). A model without a rule, or
whose rule fails the check, runs its own forward pass on batches of equal length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# states [T, H], bounds [S + 1], ids [T] -> logits [S, labels]
Classifier = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def packed_classifier(module: Any) -> Classifier | None:
    """The classification head of `module` for packed sequences, or None if no rule covers this kind of head."""
    config = module.config
    if isinstance(getattr(module, "score", None), nn.Linear):  # decoders: the last token that is not padding
        pad = config.get_text_config().pad_token_id
        return lambda states, bounds, ids: module.score(last_but_pads(states, bounds, ids, pad))
    head = getattr(module, "classifier", None)
    if head is None:
        return None
    pooler = getattr(module.base_model, "pooler", None)
    if isinstance(pooler, nn.Linear):  # ALBERT
        activation = module.base_model.pooler_activation
        return lambda states, bounds, _: head(activation(pooler(first_of(states, bounds))))
    if pooler is not None and isinstance(head, nn.Linear):  # BERT: first token through the pooler
        return lambda states, bounds, _: head(pooler(first_of(states, bounds)[:, None]))
    if hasattr(module, "pre_classifier"):  # DistilBERT
        return lambda states, bounds, _: head(torch.relu(module.pre_classifier(first_of(states, bounds))))
    if hasattr(config, "classifier_pooling"):  # ModernBERT
        pool = first_of if config.classifier_pooling == "cls" else mean_of
        return lambda states, bounds, _: head(module.head(pool(states, bounds)))
    if hasattr(head, "out_proj"):  # RoBERTa
        return lambda states, bounds, _: head(first_of(states, bounds)[:, None])
    return None


# -- states [T, H] of S sequences, bounds [S + 1]: sequence i is states[bounds[i]:bounds[i + 1]] -------------------


def lengths_of(bounds: torch.Tensor) -> torch.Tensor:
    """[S]: tokens of each sequence."""
    return bounds.diff()


def owners_of(bounds: torch.Tensor) -> torch.Tensor:
    """[T]: the sequence of each token."""
    lengths = lengths_of(bounds)
    return torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)


def first_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[S, H]: the first token of each sequence."""
    return states[bounds[:-1]]


def last_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[S, H]: the last token of each sequence."""
    return states[bounds[1:] - 1]


def last_but_pads(states: torch.Tensor, bounds: torch.Tensor, ids: torch.Tensor, pad: int | None) -> torch.Tensor:
    """[S, H]: the last token of each sequence whose id is not `pad`; of nothing but padding the first.

    Transformers does not know padding from the same token in a text, so neither may we.
    """
    if pad is None:
        return last_of(states, bounds)
    places = torch.arange(len(ids), device=ids.device)
    ends = bounds[:-1].clone()
    ends.scatter_reduce_(0, owners_of(bounds), torch.where(ids == pad, 0, places), reduce="amax")
    return states[ends]


def sum_of(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """values [T, ...] -> [S, ...]: their sum over each sequence."""
    sums = values.new_zeros(len(bounds) - 1, *values.shape[1:])
    return sums.index_add_(0, owners_of(bounds), values)


def mean_of(states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """[S, H]: the mean over each sequence."""
    return sum_of(states, bounds) / lengths_of(bounds)[:, None]


def next_token_logits(module: Any, states: torch.Tensor) -> torch.Tensor:
    """states [T, H] -> logits [T, vocabulary] float32, scaled and capped as the model's configuration says.

    Granite divides by `logits_scaling`, Cohere multiplies with `logit_scale`, Gemma caps.
    """
    config = module.config.get_text_config()
    logits: torch.Tensor = module.get_output_embeddings()(states).float()
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits.div_(divisor)
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits.mul_(factor)
    if (softcap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits
