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
from tokenizers import Tokenizer

from service.attention.masks import MaskSpec
from service.attention.rows import SCRATCH_BYTES
from service.attention.weights import attention_weights
from service.core import ExplainOptions
from service.errors import invalid
from service.models.hook import Call
from service.models.tokens import Row

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
class Look:
    """Observes one pass: the weights of row `row` of every layer, [Hq, L] each, and for a rollout the layers' calls."""

    row: int
    keeps_all: bool = False
    weights: list[torch.Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def see(self, call: Call) -> None:
        found = attention_weights(call.query, call.key, _one(call), (self.row,), scale=call.scale, softcap=call.softcap)
        self.weights.append(found[0, :, 0].cpu())
        if self.keeps_all:
            self.calls.append(call)


def _one(call: Call) -> MaskSpec:
    """The mask of a pass over one sequence, without the packing of one."""
    return replace(call.mask, cu_seqlens_q=None, cu_seqlens_k=None)


def tokens_of(row: Row, text: str | None, tokenizer: Tokenizer) -> list[Token]:
    """Every token of a row, readable."""
    if row.encoding is None or text is None:
        return [
            Token(at, tokenizer.decode([one], skip_special_tokens=False), (0, 0), False)
            for at, one in enumerate(row.ids)
        ]
    encoding = row.encoding
    rows = zip(encoding.offsets, encoding.special_tokens_mask, encoding.tokens, strict=True)
    return [
        Token(at, name if special else text[start:end] or name, (start, end), bool(special))
        for at, ((start, end), special, name) in enumerate(rows)
    ]


def find(tokens: Sequence[Token], query: int | str | None, text: str | None) -> int:
    """The token that is meant: an index (negative from the end), or the token where a part of the text begins. A part
    that is a word of its own is preferred over one inside a word."""
    if isinstance(query, str):
        if not query or text is None or (start := _place(text, query)) is None:
            raise invalid(f"query: {query[:64]!r} is not in the text", param="query")
        for token in tokens:
            if not token.is_special and token.offsets[0] <= start < token.offsets[1]:
                return token.index
        raise invalid(f"query: {query[:64]!r} is in the text, but no token is there (cut off?)", param="query")
    if query is None:
        raise invalid("query: expected a token's index or a part of the text", param="query")
    if not -len(tokens) <= query < len(tokens):
        raise invalid(f"query: token {query} is outside the {len(tokens)} tokens", param="query")
    return query % len(tokens)


def _place(text: str, part: str) -> int | None:
    start, first = text.find(part), None
    while start >= 0:
        first = start if first is None else first
        end = start + len(part)
        if not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum():
            return start
        start = text.find(part, start + 1)
    return first


def document(look: Look, tokens: Sequence[Token], options: ExplainOptions, pause: Callable[[], None]) -> dict[str, Any]:
    """The explanation as JSON. Entropies in bits; weights of one head sum to 1."""
    count = len(look.weights)
    chosen = range(count) if options.layers is None else options.layers
    for layer in chosen:
        if not -count <= layer < count:
            raise invalid(f"layers: {layer} is outside the {count} layers", param="layers")
    average = torch.stack([weights.mean(0) for weights in look.weights]).mean(0)
    told: dict[str, Any] = {
        "query": _named(tokens[look.row]),
        "tokens": len(tokens),
        "average": _top(average, tokens, options.top_k),
        "layers": [_layer(layer % count, look, tokens, options.top_k) for layer in chosen],
    }
    if options.rollout:
        told["rollout"] = _top(rollout(look, len(tokens), pause), tokens, options.top_k)
    return told


def _layer(layer: int, look: Look, tokens: Sequence[Token], top_k: int) -> dict[str, Any]:
    weights = look.weights[layer]
    entropies = -(weights * weights.clamp(min=1e-30).log2()).sum(1)
    return {
        "layer": layer,
        "average": _top(weights.mean(0), tokens, top_k),
        "heads": [
            {
                "head": head,
                "type": head_type(weights[head], look.row, tokens),
                "entropy_bits": entropies[head].item(),
                "top": _top(weights[head], tokens, top_k),
            }
            for head in range(len(weights))
        ],
    }


def head_type(weights: torch.Tensor, row: int, tokens: Sequence[Token]) -> HeadType:
    """weights [L] of one head and row: what most of its weight goes to, by the first rule that holds."""
    special = torch.tensor([token.is_special or not any(map(str.isalnum, token.text)) for token in tokens])
    if row > 0 and weights[row - 1] >= MOST:
        return "previous token"
    if row > NEAR and weights[0] >= MOST:
        return "sink"
    if weights[special].sum() >= MOST:
        return "separator"
    if weights[max(0, row - NEAR) : row + NEAR + 1].sum() >= MOST:
        return "local"
    return "broad"


def rollout(look: Look, length: int, pause: Callable[[], None]) -> torch.Tensor:
    """[L] float32: the row's attention followed down through all layers."""
    flow = torch.zeros(length)
    flow[look.row] = 1.0
    for call in reversed(look.calls):
        flow = 0.5 * flow + 0.5 * _followed(call, flow, pause)
    return flow


def _followed(call: Call, flow: torch.Tensor, pause: Callable[[], None]) -> torch.Tensor:
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
