"""Log-probabilities of given tokens and the most probable next ones, block by block: never [n, vocabulary]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from service.core.model_info import LOGITS_BYTES
from service.core.options import ScoreOptions
from service.models.inputs.rows import EncodedInput, score_positions
from service.models.inputs.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """logprobs [tokens told], float32, natural log; `first`: index of the token that logprobs[0] belongs to."""

    logprobs: torch.Tensor
    first: int
    tells_tokens: bool
    top: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]  # (position, ((token id, logprob), ...))


def score(
    states: torch.Tensor,
    tokens: Sequence[int],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    options: ScoreOptions,
    *,
    is_shifted: bool,
    pause: Callable[[], None],
) -> Scored:
    """states [L, H], one for each token. A decoder's state i tells token i + 1; `is_shifted` (encoder-decoder models,
    whose inputs begin with a start token): state i tells token i."""
    length = len(states)
    first = 0 if is_shifted else 1
    ids = torch.tensor(tokens, device=states.device)
    found: list[torch.Tensor] = []
    wanted = score_positions(options, length)
    top: dict[int, tuple[tuple[int, float], ...]] = {}
    step = max(1, LOGITS_BYTES // (4 * logits_of(states[:0]).shape[1]))
    for start in range(0, length, step):
        pause()
        rows = range(start, min(start + step, length))
        logprobs = logits_of(states[rows.start : rows.stop]).log_softmax(1)
        told = ids[rows.start + first : rows.stop + first]
        found.append(logprobs[: len(told)].gather(1, told[:, None])[:, 0])
        for position in wanted:
            if position in rows:
                values, indices = logprobs[position - start].topk(min(options.top_k, logprobs.shape[1]))
                top[position] = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return Scored(torch.cat(found).cpu(), first, options.token_logprobs, tuple((at, top[at]) for at in wanted))


def document(scored: Scored, row: EncodedInput, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """One input's scores as JSON. Perplexity = exp(-mean log-probability) of the tokens scored."""
    count, total = len(scored.logprobs), float(scored.logprobs.double().sum())
    ids = row.target or row.ids
    told: dict[str, Any] = {
        "tokens": len(ids),
        "scored_tokens": count,
        "logprob_sum": total,
        "perplexity": _perplexity(total, count),
    }
    if scored.tells_tokens:
        told["token_ids"] = list(ids)
        told["token_logprobs"] = [None] * scored.first + scored.logprobs.tolist()
        if row.pieces is not None:
            told["token_texts"] = [piece.name for piece in row.pieces]
            told["offsets"] = [[piece.start, piece.end] for piece in row.pieces]
    if scored.top:
        told["top"] = [
            {"position": at, "next": [_named(token, logprob, tokenizer) for token, logprob in best]}
            for at, best in scored.top
        ]
    return told


def _perplexity(total: float, count: int) -> float | None:
    """None where nothing was scored, or the number is too large to write."""
    if count == 0 or -total / count > 700:
        return None
    return math.exp(-total / count)


def _named(token: int, logprob: float, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    text = tokenizer.name(token) if tokenizer is not None else None
    return {"token_id": token, "text": text, "logprob": logprob}
