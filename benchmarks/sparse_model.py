"""What sparse attention does to a real decoder that reads long texts: seconds, last hidden state, loss, facts found.

Each document is a real text with ten facts at ten depths, and at its end the ten questions. A fact is ranked by the
next token's probability after its question, among twenty answers of one token; each question is followed by its
answer, so that one pass ranks all ten. The same model in Transformers with SDPA is the exact one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.attention import Step
from benchmarks.real_attention import read, relative
from service.config import Config, ModelConfig
from service.core.answer import Answer
from service.core.options import HiddenOptions
from service.core.request import ForwardRequest
from service.engine.engine import Engine
from service.models.loading.rope import scale_rope
from service.telemetry.metrics import Metrics

NAMES = ("Alice", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James")
ANSWERS = (
    *("red", "blue", "green", "black", "white", "gold", "silver", "stone", "river", "mountain"),
    *("summer", "winter", "dog", "horse", "bread", "music", "house", "bridge", "paper", "glass"),
)
FACT, QUESTION = "\nThe secret word of {} is{}.\n", "\nThe secret word of {} is"
LOSS_ROWS = 512  # rows of logits that are held at a time


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    directory: Path
    tokens: int
    documents: int
    max_error: float
    text: Path | None = None  # None: what CPython's interactive help says


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens with facts, and where they are asked for."""

    ids: tuple[int, ...]
    asked: tuple[int, ...]  # positions of the questions' last tokens
    right: tuple[int, ...]  # index into ANSWERS of each


@dataclass(frozen=True, slots=True)
class Read:
    """One document, read by both."""

    plan: str
    seconds: float  # of the engine's answer
    sdpa_s: float
    reported: float  # error of the last hidden state: what the answer estimated
    reported_upper: float
    error: float  # true
    worst_row: float  # largest relative error of one token's state
    loss: float
    exact_loss: float
    ranks: tuple[int, ...]  # of the right answers, 1 is best
    exact_ranks: tuple[int, ...]
    densities: tuple[float | None, ...]  # of each layer; None: exact
    layer_uppers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """All documents."""

    speedup: float  # SDPA's seconds over ours, in all
    error: float  # largest
    covered: float  # share of documents whose error was not above what was reported
    loss_difference: float  # mean, ours less exact
    same_ranks: float  # share of facts
    found: float  # share of facts that rank first
    exact_found: float


def summary(reads: Sequence[Read]) -> Summary:
    ranks = [pair for one in reads for pair in zip(one.ranks, one.exact_ranks, strict=True)]
    return Summary(
        speedup=sum(one.sdpa_s for one in reads) / sum(one.seconds for one in reads),
        error=max(one.error for one in reads),
        covered=fmean(one.error <= one.reported_upper for one in reads),
        loss_difference=fmean(one.loss - one.exact_loss for one in reads),
        same_ranks=fmean(ours == exact for ours, exact in ranks),
        found=fmean(ours == 1 for ours, _ in ranks),
        exact_found=fmean(exact == 1 for _, exact in ranks),
    )


def run(settings: Settings, step: Step) -> Iterator[Read]:
    """Read each document with the engine, as a request for hidden states, and with Transformers.

    Raises ValueError if the text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.directory)
    made = documents(settings, tokenizer)
    config = AutoConfig.from_pretrained(settings.directory)
    scaling = None
    if settings.tokens > config.max_position_embeddings:
        scaling = {"rope_type": "yarn", "factor": settings.tokens / config.max_position_embeddings}
        scale_rope(settings.directory.name, config, scaling)
    exact: Any = AutoModelForCausalLM.from_pretrained(
        settings.directory, config=config, attn_implementation="sdpa", dtype=torch.float32
    )
    model = ModelConfig(name=settings.directory.name, path=str(settings.directory), task="score", rope_scaling=scaling)
    engine = Engine.start(
        Config(models=(model,), max_batch_tokens=max(16384, settings.tokens), output_audit_share=0.0), Metrics()
    )
    answers = [tokenizer.encode(f" {answer}", add_special_tokens=False)[0] for answer in ANSWERS]
    try:
        for number, one in enumerate(made, 1):
            step(f"document {number}: ours")
            start = perf_counter()
            answer = asyncio.run(_answer(engine, model.name, one, settings.max_error))
            ours_s = perf_counter() - start
            step(f"document {number}: SDPA")
            start = perf_counter()
            with torch.inference_mode():
                states = exact.base_model(input_ids=torch.tensor([one.ids]), use_cache=False).last_hidden_state[0]
            yield _read(one, answer, (ours_s, perf_counter() - start), states, exact.lm_head, answers)
    finally:
        engine.close()


def documents(settings: Settings, tokenizer: Any) -> list[Document]:
    """Other stretches of the text and other answers in each. Raises ValueError if the text is too short."""
    text = read(settings.text)
    found = []
    for number in range(settings.documents):
        draw = random.Random(number)
        right = [draw.randrange(len(ANSWERS)) for _ in NAMES]
        facts = [_ids(tokenizer, FACT.format(name, f" {ANSWERS[at]}")) for name, at in zip(NAMES, right, strict=True)]
        order = draw.sample(range(len(NAMES)), len(NAMES))
        end: list[int] = []
        asked = []
        for at in order:
            end += _ids(tokenizer, QUESTION.format(NAMES[at]))
            asked.append(len(end) - 1)
            end += _ids(tokenizer, f" {ANSWERS[right[at]]}.")
        room = settings.tokens - len(end) - sum(map(len, facts))
        stretch = text[number * 6 * settings.tokens :][: 8 * settings.tokens]
        words = _ids(tokenizer, stretch)[: max(0, room)]
        if room <= 0 or len(words) < room:
            raise ValueError(f"document {number + 1} of the text has {len(words):,} tokens, expected {room:,}")
        edges = [room * part // len(NAMES) for part in range(len(NAMES) + 1)]
        body: list[int] = []
        for (start, stop), fact in zip(pairwise(edges), facts, strict=True):
            middle = (start + stop) // 2
            body += words[start:middle] + fact + words[middle:stop]
        positions = tuple(len(body) + position for position in asked)
        found.append(Document(tuple(body + end), positions, tuple(right[at] for at in order)))
    return found


async def _answer(engine: Engine, name: str, document: Document, max_error: float) -> Answer:
    options = HiddenOptions(max_error=max_error, timeout_s=7200)
    return await engine.submit(ForwardRequest("bench", name, "hidden", options, token_ids=(document.ids,)))


def _read(
    document: Document,
    answer: Answer,
    seconds: tuple[float, float],
    exact: torch.Tensor,
    head: torch.nn.Module,
    answers: list[int],
) -> Read:
    ours = answer.tensors["hidden_states"]
    rows = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    return Read(
        plan=answer.plan.kind.value,
        seconds=seconds[0],
        sdpa_s=seconds[1],
        reported=answer.error.relative_l2,
        reported_upper=answer.error.relative_l2_upper,
        error=relative(ours, exact),
        worst_row=float(rows.max()),
        loss=_loss(ours, document, head),
        exact_loss=_loss(exact, document, head),
        ranks=_ranks(ours, document, head, answers),
        exact_ranks=_ranks(exact, document, head, answers),
        densities=tuple(layer.density for layer in answer.layers),
        layer_uppers=tuple(layer.error.relative_l2_upper for layer in answer.layers),
    )


@torch.inference_mode()
def _loss(states: torch.Tensor, document: Document, head: torch.nn.Module) -> float:
    """Mean over the next tokens, nats."""
    target = torch.tensor(document.ids[1:])
    parts = zip(torch.split(states[:-1], LOSS_ROWS), torch.split(target, LOSS_ROWS), strict=True)
    return sum(float(cross_entropy(head(rows), ids, reduction="sum")) for rows, ids in parts) / len(target)


@torch.inference_mode()
def _ranks(states: torch.Tensor, document: Document, head: torch.nn.Module, answers: list[int]) -> tuple[int, ...]:
    scores = head(states[list(document.asked)])[:, answers]
    right = scores.gather(1, torch.tensor(document.right)[:, None])
    return tuple((1 + (scores > right).sum(1)).tolist())


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
