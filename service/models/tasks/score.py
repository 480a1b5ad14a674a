"""Log-probabilities of given tokens and the most probable next ones, block by block: never [n, vocabulary] at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from service.attention.output import Checkpoint
from service.core.model_info import LOGITS_BYTES
from service.core.options import ScoreOptions
from service.models.inputs.rows import EncodedInput, score_positions
from service.models.inputs.tokenizer import TextTokenizer

Candidates = tuple[tuple[int, float], ...]  # (token id, log-probability), most probable first


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of one input's tokens."""

    logprobs: torch.Tensor  # [scored tokens] float32, natural log
    first: int  # index of the token that logprobs[0] belongs to
    includes_tokens: bool  # the caller asked for each token's log-probability
    top: tuple[tuple[int, Candidates], ...]  # (position, candidates for the next token)


def score(
    states: torch.Tensor,
    tokens: Sequence[int],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    options: ScoreOptions,
    *,
    is_shifted: bool,
    checkpoint: Checkpoint,
) -> TokenScores:
    """states [L, H] and the tokens [L] of one input -> their scores.

    Args:
        states: one state for each token.
        tokens: their ids.
        logits_of: states [n, H] -> logits [n, vocabulary] float32.
        options: which positions report the next tokens, and how many.
        is_shifted: state i predicts token i (encoder-decoder models, whose inputs begin with a start token); else it
            predicts token i + 1.
        checkpoint: called before each block; may raise to stop.

    Returns:
        Log-probabilities of all tokens but, unless `is_shifted`, the first. Raises FarsightError (422) if a position is
        outside the input.
    """
    length = len(states)
    first = 0 if is_shifted else 1
    ids = torch.tensor(tokens, device=states.device)
    blocks: list[torch.Tensor] = []
    positions = score_positions(options, length)
    top: dict[int, Candidates] = {}
    step = max(1, LOGITS_BYTES // (4 * logits_of(states[:0]).shape[1]))
    for start in range(0, length, step):
        checkpoint()
        rows = range(start, min(start + step, length))
        logprobs = logits_of(states[rows.start : rows.stop]).log_softmax(1)
        predicted = ids[rows.start + first : rows.stop + first]
        blocks.append(logprobs[: len(predicted)].gather(1, predicted[:, None])[:, 0])
        for position in positions:
            if position in rows:
                values, indices = logprobs[position - start].topk(min(options.top_k, logprobs.shape[1]))
                top[position] = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    by_position = tuple((position, top[position]) for position in positions)
    return TokenScores(torch.cat(blocks).cpu(), first, options.token_logprobs, by_position)


def document(scores: TokenScores, row: EncodedInput, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """The scores of one input as JSON. Perplexity is exp(-mean log-probability) of the scored tokens."""
    count, total = len(scores.logprobs), float(scores.logprobs.double().sum())
    ids = row.target or row.ids
    result: dict[str, Any] = {
        "tokens": len(ids),
        "scored_tokens": count,
        "logprob_sum": total,
        "perplexity": _perplexity(total, count),
    }
    if scores.includes_tokens:
        result["token_ids"] = list(ids)
        result["token_logprobs"] = [None] * scores.first + scores.logprobs.tolist()
        if row.spans is not None:
            result["token_texts"] = [span.name for span in row.spans]
            result["offsets"] = [[span.start, span.end] for span in row.spans]
    if scores.top:
        result["top"] = [
            {"position": position, "next": [_named(token, logprob, tokenizer) for token, logprob in candidates]}
            for position, candidates in scores.top
        ]
    return result


def _perplexity(total: float, count: int) -> float | None:
    """None if no token was scored, or the number is too large for JSON."""
    if count == 0 or -total / count > 700:
        return None
    return math.exp(-total / count)


def _named(token: int, logprob: float, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    text = tokenizer.name(token) if tokenizer is not None else None
    return {"token_id": token, "text": text, "logprob": logprob}
