"""Which tokens a token attends to: per layer and head, averaged, and through all layers. Memory linear in n.

The weights of one row are computed again from the queries and keys of each attention call; an n x n matrix of weights
is never held. Rollout multiplies a row vector with each layer's averaged weights (half of it the residual connection)
from the last layer to the first, a block of rows at a time. Ref: Abnar and Zuidema, arXiv 2005.00928.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from service.attention.geometry import ROWS_BYTES
from service.attention.masks import MaskSpec
from service.attention.output import Checkpoint, no_checkpoint
from service.attention.weights import WeightsView, attention_weights
from service.core.options import ExplainOptions
from service.models.hook import AttentionCall, ForwardContext
from service.models.inputs.rows import EncodedInput
from service.models.inputs.tokenizer import TextTokenizer

HeadType = Literal["previous token", "sink", "separator", "local", "broad"]
MIN_SHARE = 0.5  # of a head's weight: what a head type is named after has at least this much
MAP_TILES = 64  # a side, of a layer's block map
LOCAL_TOKENS = 4  # to either side of the query token


@dataclass(frozen=True, slots=True)
class Token:
    """A token as a person reads it: `text` is its part of the input, or its name if it is a special token."""

    index: int
    text: str
    offsets: tuple[int, int]  # characters; (0, 0) for special tokens
    is_special: bool


@dataclass(slots=True)
class AttentionProbe:
    """Observes one pass over one sequence of L tokens: collects the weights of row `row` in every layer.

    For a rollout it keeps each layer's attention call, too.
    """

    row: int
    keeps_calls: bool = False
    weights: list[torch.Tensor] = field(default_factory=list)  # [Hq, L] float32 of each layer, on the CPU
    calls: list[AttentionCall] = field(default_factory=list)

    def observe(self, call: AttentionCall) -> None:
        """Collect one layer's weights; `ForwardContext.observe` calls it."""
        self.weights.append(_weights(call, (self.row,))[:, 0].cpu())
        if self.keeps_calls:
            self.calls.append(call)


def tokens_of(row: EncodedInput, text: str | None, tokenizer: TextTokenizer) -> list[Token]:
    """Every token of a row in readable form. `text`: the input; None if the caller sent token ids."""
    if row.spans is None or text is None:
        return [Token(index, tokenizer.name(token), (0, 0), False) for index, token in enumerate(row.ids)]
    return [
        Token(
            index,
            span.name if span.is_special else text[span.start : span.end] or span.name,
            (span.start, span.end),
            span.is_special,
        )
        for index, span in enumerate(row.spans)
    ]


def document(
    probe: AttentionProbe, tokens: Sequence[Token], options: ExplainOptions, context: ForwardContext
) -> dict[str, Any]:
    """The explanation as JSON. Entropies in bits; weights of one head sum to 1.

    Args:
        probe: has observed the pass over these tokens.
        tokens: all tokens of the input.
        options: the layers to report, and how many tokens of each head.
        context: of the pass, with its maps; its checkpoint is called before each layer and block of rows.

    Returns:
        The query token, the average over all layers and heads, each layer's heads and, on request, the rollout.
    """
    count, checkpoint = len(probe.weights), context.checkpoint or no_checkpoint
    chosen = range(count) if options.layers is None else dict.fromkeys(layer % count for layer in options.layers)
    separators = torch.tensor([token.is_special or not any(map(str.isalnum, token.text)) for token in tokens])
    layers = []
    for layer in chosen:
        checkpoint()
        layers.append(_layer(layer, probe, tokens, separators, options.top_k))
        if options.block_map:
            layers[-1]["block_map"] = _map_document(context.maps[layer])
    average = torch.stack([weights.mean(0) for weights in probe.weights]).mean(0)
    explanation: dict[str, Any] = {
        "query": _named(tokens[probe.row]),
        "tokens": len(tokens),
        "average": _top(average, tokens, options.top_k),
        "layers": layers,
    }
    if options.rollout:
        explanation["rollout"] = _top(rollout(probe, len(tokens), checkpoint), tokens, options.top_k)
    return explanation


def head_type(weights: torch.Tensor, row: int, separators: torch.Tensor) -> HeadType:
    """weights [L] of one head at query `row`, separators [L] bool -> where most weight goes, by the first rule that
    holds. Separators are special tokens and punctuation."""
    if row > 0 and weights[row - 1] >= MIN_SHARE:
        return "previous token"
    if row > LOCAL_TOKENS and weights[0] >= MIN_SHARE:
        return "sink"
    if weights[separators].sum() >= MIN_SHARE:
        return "separator"
    if weights[max(0, row - LOCAL_TOKENS) : row + LOCAL_TOKENS + 1].sum() >= MIN_SHARE:
        return "local"
    return "broad"


def rollout(probe: AttentionProbe, length: int, checkpoint: Checkpoint) -> torch.Tensor:
    """[L] float32: the attention of the probed row through all layers. Sums to 1."""
    flow = torch.zeros(length)
    flow[probe.row] = 1.0
    for call in reversed(probe.calls):
        flow = 0.5 * flow + 0.5 * _propagated(call, flow, checkpoint)
    return flow


def _propagated(call: AttentionCall, flow: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    """flow [L] times the weights [L, L] averaged over heads; rows with zero flow are skipped."""
    rows = flow.nonzero()[:, 0].tolist()
    heads, length = call.query.shape[1], call.key.shape[2]
    step = max(1, ROWS_BYTES // (4 * heads * length))
    propagated = torch.zeros(length)
    for start in range(0, len(rows), step):
        checkpoint()
        block = tuple(rows[start : start + step])
        propagated += flow[list(block)] @ _weights(call, block).mean(0).cpu()
    return propagated


def _weights(call: AttentionCall, rows: tuple[int, ...]) -> torch.Tensor:
    """Softmax weights of R rows of a call over one sequence: [Hq, R, L] float32."""
    mask: MaskSpec = replace(call.mask, cu_seqlens_q=None, cu_seqlens_k=None)
    return attention_weights(call.query, call.key, mask, WeightsView(rows), scoring=call.scoring)[0]


def _layer(
    layer: int, probe: AttentionProbe, tokens: Sequence[Token], separators: torch.Tensor, top_k: int
) -> dict[str, Any]:
    weights = probe.weights[layer]
    entropies = -(weights * weights.clamp(min=1e-30).log2()).sum(1)
    return {
        "layer": layer,
        "average": _top(weights.mean(0), tokens, top_k),
        "heads": [
            {
                "head": head,
                "type": head_type(weights[head], probe.row, separators),
                "entropy_bits": entropies[head].item(),
                "top": _top(weights[head], tokens, top_k),
            }
            for head in range(len(weights))
        ],
    }


def _map_document(block_map: torch.Tensor) -> dict[str, Any]:
    """[heads, r, c] uint8."""
    data = base64.b64encode(block_map.contiguous().numpy().tobytes()).decode()
    return {"dtype": "uint8", "shape": list(block_map.shape), "data": data}


def _top(weights: torch.Tensor, tokens: Sequence[Token], top_k: int) -> list[dict[str, Any]]:
    values, indices = weights.topk(min(top_k, len(weights)))
    return [
        {**_named(tokens[index]), "weight": value}
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _named(token: Token) -> dict[str, Any]:
    return {"index": token.index, "text": token.text, "offsets": list(token.offsets)}
