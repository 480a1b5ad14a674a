"""Which tokens a token attends to: per layer and head, averaged, and followed through the layers. Memory linear in n.

The weights of one row are computed again from the queries and keys of each attention call; a matrix of n x n weights
is never held. Rollout (Abnar and Zuidema, arXiv 2005.00928) multiplies a row vector with each layer's averaged weights
(half of it the residual connection) from the last layer down, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from service.attention.masks import MaskSpec
from service.attention.rows import SCRATCH_BYTES
from service.attention.weights import attention_weights
from service.core.options import ExplainOptions
from service.models.hook import AttentionCall
from service.models.inputs.rows import EncodedInput
from service.models.inputs.tokenizer import TextTokenizer

HeadType = Literal["previous token", "sink", "separator", "local", "broad"]
MOST = 0.5  # of a head's weight, for a type's name
NEAR = 4  # tokens to either side


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a person reads it: `text` is its piece of the input, or its name where it is a special token."""

    index: int
    text: str
    offsets: tuple[int, int]  # characters; (0, 0) for special tokens
    is_special: bool


@dataclass(slots=True)
class AttentionProbe:
    """Observes one pass: the weights of row `row` of every layer, [Hq, L] each, and for a rollout the layers' calls."""

    row: int
    keeps_all: bool = False
    weights: list[torch.Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)

    def see(self, call: AttentionCall) -> None:
        found = attention_weights(call.query, call.key, _one(call), (self.row,), scale=call.scale, softcap=call.softcap)
        self.weights.append(found[0, :, 0].cpu())
        if self.keeps_all:
            self.calls.append(call)


def _one(call: AttentionCall) -> MaskSpec:
    """The mask of a pass over one sequence, without the packing of one."""
    return replace(call.mask, cu_seqlens_q=None, cu_seqlens_k=None)


def tokens_of(row: EncodedInput, text: str | None, tokenizer: TextTokenizer) -> list[Token]:
    """Every token of a row, readable."""
    if row.pieces is None or text is None:
        return [Token(at, tokenizer.name(one), (0, 0), False) for at, one in enumerate(row.ids)]
    return [
        Token(
            at,
            one.name if one.is_special else text[one.start : one.end] or one.name,
            (one.start, one.end),
            one.is_special,
        )
        for at, one in enumerate(row.pieces)
    ]


def document(
    look: AttentionProbe, tokens: Sequence[Token], options: ExplainOptions, pause: Callable[[], None]
) -> dict[str, Any]:
    """The explanation as JSON. Entropies in bits; weights of one head sum to 1."""
    count = len(look.weights)
    chosen = range(count) if options.layers is None else dict.fromkeys(layer % count for layer in options.layers)
    separators = torch.tensor([token.is_special or not any(map(str.isalnum, token.text)) for token in tokens])
    layers = []
    for layer in chosen:
        pause()
        layers.append(_layer(layer, look, tokens, separators, options.top_k))
    average = torch.stack([weights.mean(0) for weights in look.weights]).mean(0)
    told: dict[str, Any] = {
        "query": _named(tokens[look.row]),
        "tokens": len(tokens),
        "average": _top(average, tokens, options.top_k),
        "layers": layers,
    }
    if options.rollout:
        told["rollout"] = _top(rollout(look, len(tokens), pause), tokens, options.top_k)
    return told


def _layer(
    layer: int, look: AttentionProbe, tokens: Sequence[Token], separators: torch.Tensor, top_k: int
) -> dict[str, Any]:
    weights = look.weights[layer]
    entropies = -(weights * weights.clamp(min=1e-30).log2()).sum(1)
    return {
        "layer": layer,
        "average": _top(weights.mean(0), tokens, top_k),
        "heads": [
            {
                "head": head,
                "type": head_type(weights[head], look.row, separators),
                "entropy_bits": entropies[head].item(),
                "top": _top(weights[head], tokens, top_k),
            }
            for head in range(len(weights))
        ],
    }


def head_type(weights: torch.Tensor, row: int, separators: torch.Tensor) -> HeadType:
    """weights [L] of one head and row: what most of its weight goes to, by the first rule that holds. `separators`:
    special tokens and punctuation, bool [L]."""
    if row > 0 and weights[row - 1] >= MOST:
        return "previous token"
    if row > NEAR and weights[0] >= MOST:
        return "sink"
    if weights[separators].sum() >= MOST:
        return "separator"
    if weights[max(0, row - NEAR) : row + NEAR + 1].sum() >= MOST:
        return "local"
    return "broad"


def rollout(look: AttentionProbe, length: int, pause: Callable[[], None]) -> torch.Tensor:
    """[L] float32: the row's attention followed down through all layers."""
    flow = torch.zeros(length)
    flow[look.row] = 1.0
    for call in reversed(look.calls):
        flow = 0.5 * flow + 0.5 * _followed(call, flow, pause)
    return flow


def _followed(call: AttentionCall, flow: torch.Tensor, pause: Callable[[], None]) -> torch.Tensor:
    """flow [L] times the weights [L, L] averaged over heads, rows without flow left out."""
    rows = flow.nonzero()[:, 0].tolist()
    heads, length = call.query.shape[1], call.key.shape[2]
    step = max(1, SCRATCH_BYTES // (4 * heads * length))
    followed = torch.zeros(length)
    for start in range(0, len(rows), step):
        pause()
        part = tuple(rows[start : start + step])
        weights = attention_weights(call.query, call.key, _one(call), part, scale=call.scale, softcap=call.softcap)
        followed += flow[list(part)] @ weights[0].mean(0).cpu()
    return followed


def _top(weights: torch.Tensor, tokens: Sequence[Token], top_k: int) -> list[dict[str, Any]]:
    values, indices = weights.topk(min(top_k, len(weights)))
    return [
        {**_named(tokens[at]), "weight": value} for at, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _named(token: Token) -> dict[str, Any]:
    return {"index": token.index, "text": token.text, "offsets": list(token.offsets)}
